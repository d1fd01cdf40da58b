"""``htnet train``: one model on everything, by several processes; run again, it goes on where it stopped."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from htnet.config import Config
from htnet.data.loso import Division, divide_store
from htnet.data.store.merged import open_stores
from htnet.data.store.reader import Store
from htnet.errors import EXIT_DONE, EXIT_PARTIAL, InputError
from htnet.rules import check_initial_weights, check_one_flow_size, check_samples, check_scale
from launch.cluster import ClusterGoneError, Needs, Nodes, ray_cluster
from launch.group import Group, Lost
from launch.run.training import TrainingFolder, check_logging, check_training, open_training
from launch.screen import RESUME, TrainBoard, say
from launch.tasks.model import ModelOutcome, ModelSpec, train_model

__all__ = ["plan", "train"]

STOP_SECONDS = 120.0
"""Time that the workers have for a snapshot after an interrupt."""


def train(config: Config, out: Path, address: str | None, console: Console) -> int:
    """Train the model that ``out`` will hold; return the exit code."""
    store = open_stores(config.data.store)
    division = check_division(config, store)
    with open_training(out, config, store) as folder:
        if (out / "model.json").is_file():
            say(console, f"{out}: is trained already")
            return EXIT_DONE
        identity = check_training(out, config, store)
        spec = ModelSpec(config=config.anchored(store.address), division=division, out=out.resolve(), identity=identity)
        driver = _Driver(spec=spec, folder=folder, console=console)
        outcome = driver.run(address)
        if outcome is None:
            return EXIT_PARTIAL
        folder.event("trained", steps=outcome.steps, attempts=driver.attempts)
        folder.remove_working_files()
    say(console, f"{out}: trained in {outcome.steps} steps; use it with: htnet predict {out} CLIP --out DIR")
    return EXIT_DONE


@dataclass(kw_only=True)
class _Driver:
    """The driver's view of a training while it goes on."""

    spec: ModelSpec
    folder: TrainingFolder
    console: Console
    attempts: int = 0

    def run(self, address: str | None) -> ModelOutcome | None:
        """Train to the end; None if it was stopped, or given up."""
        scale = self.spec.config.scale
        needs = Needs(
            task="worker",
            cpus=scale.cpus_per_worker,
            gpus=scale.gpus_per_worker,
            cpus_key="scale.cpus_per_worker",
            gpus_key="scale.gpus_per_worker",
        )
        board = TrainBoard(self.console, self.folder.read_progress)
        try:
            with ray_cluster(address, needs) as ray, board:
                check_room(ray, scale.workers, needs)
                group = Group[ModelSpec, ModelOutcome](
                    ray=ray,
                    task=train_model,
                    workers=scale.workers,
                    needs=needs,
                    stall_seconds=60 * self.spec.config.resources.stall_minutes,
                    progress=self.folder.read_progress,
                    on_look=board.look,
                    on_event=self._event,
                    on_interrupt=self._ask_to_stop,
                )
                return self._attempts(group)
        except KeyboardInterrupt:
            say(self.console, f"Interrupted. {RESUME}")
        except ClusterGoneError as error:
            self.folder.event("stopped", reason=str(error))
            say(self.console, f"Stopped: {error}. {RESUME}")
        return None

    def _attempts(self, group: Group[ModelSpec, ModelOutcome]) -> ModelOutcome | None:
        """Start the group, and again where a rank is lost: the training goes on from the newest snapshot."""
        retries = self.spec.config.resources.retries
        while True:
            self.attempts += 1
            self._event("group_started", workers=group.workers, attempt=self.attempts)
            outcome = group.run(self.spec)
            if isinstance(outcome, Lost):
                self._event("group_lost", attempt=self.attempts, reason=outcome.reason)
                last = outcome.reason.strip().splitlines()[-1]
                if self.attempts > retries:
                    say(self.console, f"given up after {self.attempts} attempts: {last}. {RESUME}", style="red")
                    return None
                say(self.console, f"{last}: the group is started again")
                continue
            for aside in outcome.damage:
                self._event("set_aside", path=aside.path, now=aside.now, reason=aside.reason)
                say(self.console, str(aside))
            if outcome.reason is not None:
                self._event("failed", reason=outcome.reason)
                say(self.console, outcome.reason, style="red")
                return None
            if outcome.stopped:
                self._event("stopped", steps=outcome.steps)
                say(self.console, f"Interrupted: saved after {outcome.steps} steps. {RESUME}")
                return None
            return outcome

    def _ask_to_stop(self) -> float:
        """Ask the workers to save and stop; returns the seconds that they have for it."""
        self.folder.stop.touch()
        say(self.console, "Interrupted: saving; once more to stop at once")
        return STOP_SECONDS

    def _event(self, kind: str, **facts: Any) -> None:
        self.folder.event(kind, **facts)
        if kind == "waiting_for_room":
            say(
                self.console,
                f"waiting for room for {facts['workers']} workers; the cluster has {facts['places']} places",
            )


def check_room(ray: Any, workers: int, needs: Needs) -> None:
    """Refuse a group that would wait for ever.

    Raises:
        InputError: the cluster has fewer places than workers; names the keys.
    """
    places = Nodes(ray).places(needs.cpus, needs.gpus)
    if places < workers:
        asked = f"{needs.cpus_key}={needs.cpus:g}, {needs.gpus_key}={needs.gpus:g}"
        raise InputError(f"scale.workers={workers}: there is room for {places} with {asked}")


def check_division(config: Config, store: Store) -> Division:
    """Return the samples of the model; refuse what would fail on every worker, before any is started."""
    division = divide_store(store, config)
    if config.data.augment.changes_pixels:
        check_one_flow_size(store, division.train)
    check_samples(config, store, (*division.train, *division.validation))
    check_scale(config, len(division.train))
    check_logging(config.logging)
    check_initial_weights(config, {store.samples[row].subject for row in division.validation})
    return division


def plan(config: Config, out: Path) -> list[str]:
    """Say what a training of this configuration would do; check the store and an existing training."""
    store = open_stores(config.data.store)
    division = check_division(config, store)
    identity = check_training(out, config, store)
    scale, held = config.scale, {store.samples[row].subject for row in division.validation}
    steps = -(-len(division.train) // config.train.batch_size)
    return [
        f"store {store.path}: {len(store.rows)} samples, digest {store.digest[:12]}",
        f"trains on {len(division.train)} samples, {config.train.epochs} epochs of {steps} steps; validates on "
        f"{len(division.validation)} samples of {len(held)} subjects",
        f"{scale.workers} workers with {scale.cpus_per_worker:g} CPUs and {scale.gpus_per_worker:g} GPUs each; ZeRO "
        f"{scale.zero}, {config.engine.precision}",
        f"identity {identity}",
    ]
