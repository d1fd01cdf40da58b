"""Cells of other people's tables: the one place that says which text, number or mark a cell holds.

Spreadsheet programs, pandas and copied web pages write the same content in many ways: ``59.0`` for 59, ``59,0`` where
commas are decimal, invisible characters at a name's end, a line break in a header, ``0.0`` for a mark that is not set.
"""

from __future__ import annotations

import datetime
import re
import unicodedata
from decimal import Decimal

ERROR_VALUES = frozenset({"#N/A", "#NAME?", "#VALUE!", "#REF!", "#DIV/0!", "#NUM!", "#NULL!"})
"""Results of formulas that failed."""
NOT_A_NUMBER = frozenset({"", "nan", "na", "n/a", "none", "null", "<na>"})
"""Small-letter words for a number that is not there, as pandas and R write them."""
_NOT_MARKED = NOT_A_NUMBER | {"-", "/", "false", "no", "n"}
_MARKED = frozenset({"true", "yes", "y", "x"})
_NUMBER = re.compile(r"[+-]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]{1,3})?")
_WHOLE_FLOAT = re.compile(r"([+-]?[0-9]+)([.,])(0+)")
_THOUSANDS = 3
"""Zeros behind a comma or point that may be thousands where both may be decimal: 3,000 is three, or three thousand."""
_BREAKS = re.compile(r"\s*[\n\r\v\f\x1c-\x1e\x85\u2028\u2029]+\s*")
_BLANKS = re.compile(r"[^\S ]")
_QUOTED = re.compile(r'="([^"]*)"')
"""A formula by which spreadsheet programs keep a text such as 006 from becoming a number."""

Moment = datetime.date | datetime.time | datetime.timedelta
"""A date (or a datetime, which is one), a time of day or a span, as readers of workbooks give them."""


def text_of(value: object, *, decimal_comma: bool = False) -> str:
    """Turn a cell into the text that a person sees, empty where it is blank.

    Blanks around it and invisible characters are dropped, a line break becomes one blank, and a whole number loses its
    ``.0`` (``,0`` where commas are decimal), be it a number or a text.
    """
    if value is None:
        return ""
    if isinstance(value, float):
        return "" if value != value else str(int(value)) if value.is_integer() else repr(value)
    text = visible(str(value))
    if quoted := _QUOTED.fullmatch(text):
        return visible(quoted[1])
    whole = _WHOLE_FLOAT.fullmatch(text)
    if whole and (whole[2] == "." or decimal_comma) and not (decimal_comma and len(whole[3]) == _THOUSANDS):
        return whole[1]
    return text


def visible(text: str) -> str:
    """Drop invisible characters and the blanks around; every line break, with its blanks, becomes one blank."""
    if not text.isascii():
        # byte-order marks, zero-width blanks, soft hyphens, marks of direction
        text = "".join(letter for letter in text if unicodedata.category(letter) != "Cf")
    text = _BLANKS.sub(" ", _BREAKS.sub(" ", text.replace("_x000D_", "\n").strip()))
    return "".join(letter for letter in text if letter.isprintable() or not letter.isascii()).strip()


def number_of(text: str, *, decimal_comma: bool = False) -> Decimal | None:
    """Read a decimal number, exactly; None where the text is none.

    ``decimal_comma``: one comma may stand where the point does, as in tables whose columns a comma cannot separate.
    Separators of thousands are not read: 1,234 means two numbers to two people.
    """
    if decimal_comma and text.count(",") == 1 and "." not in text:
        text = text.replace(",", ".")
    return Decimal(text) if _NUMBER.fullmatch(text) else None


def whole_of(text: str, *, decimal_comma: bool = False) -> int | None:
    """Read a whole number such as ``59``, ``59.0`` or ``5.9e1``; None where the text is none.

    ``decimal_comma``: as of :func:`number_of`; of 3,000 and 3.000 nobody knows then which number is meant.
    """
    if decimal_comma and (found := _WHOLE_FLOAT.fullmatch(text)) and len(found[3]) == _THOUSANDS:
        return None
    value = number_of(text, decimal_comma=decimal_comma)
    # the exponent has three digits at most, so that the integer stays small
    return int(value) if value is not None and value == value.to_integral_value() else None


def mark_of(text: str, *, decimal_comma: bool = False) -> bool | None:
    """Read a mark: 1, 1.0, TRUE, yes or x is set; 0, 0.0, FALSE, no, a dash or a blank is not; None for the rest."""
    word = text.casefold()
    if word in _NOT_MARKED or word in _MARKED:
        return word in _MARKED
    number = number_of(text, decimal_comma=decimal_comma)
    return bool(number) if number is not None and number in (0, 1) else None
