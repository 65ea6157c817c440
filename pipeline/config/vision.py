"""The `[vision]` table: which encoders look at the images of a corpus, and what is kept of them.

One idea: everything in `[[vision.encoder]]` changes what a target means and is in the plan; what is
directly under `[vision]`, the shard size apart, is speed and is not.
"""

from typing import Annotated, Literal

from pydantic import Field, StringConstraints, model_validator

from stillroom.pipeline.config.strict import PathText, Table

Kind = Literal[
    "dinov2",
    "clip",
    "siglip",
    "depth_anything",
    "mask2former",
    "oneformer",
    "clip_embeds",
    "efficientnet_lite0",
    "teacher_tower",
]
Name = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9_-]{0,40}$")]


class Encoder(Table):
    """One `[[vision.encoder]]`: a frozen encoder and the part of its output that is a target."""

    name: Name
    """The target is the signal `image.<name>`."""
    kind: Kind
    """Which family of encoders `model` belongs to."""
    model: PathText = ""
    """HF directory or hub id; `teacher_tower` takes the teacher's when it is empty."""
    revision: str = ""
    """Of a hub id: branch, tag or commit."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Arithmetic of the forward pass."""
    layers: tuple[int | Literal["final"], ...] = ()
    """Blocks (1-based) whose outputs are averaged; "final" is the model's own last state. Empty
    takes "final"; `depth_anything` takes the layers its decoder reads (mean of four, as OLA-VLM
    does), `teacher_tower` the layer that the language model reads, Swin backbones their last
    stage."""
    final_norm: bool = False
    """Apply the encoder's last layer norm to each of `layers`, as DINOv2's own
    `get_intermediate_layers` does."""
    tokens: Literal["patches", "cls", "mean"] = "patches"
    """All patches, the class token alone, or the mean of the patches."""
    size: int = Field(default=0, ge=0, le=4096)
    """Pixels of a side that the encoder sees; 0 takes OLA-VLM's (336 for depth, 768 for Mask2Former
    and OneFormer), else the model's own."""
    crop: Literal["squash", "center"] = "squash"
    """`squash` resizes the whole image to a square; `center` keeps the largest centred square."""
    grid: int = Field(default=0, ge=0, le=256)
    """Side of the patch grid after pooling (averages; bilinear where it grows); 0: as it is."""
    codec: Literal["bf16", "fp16", "int8", "fp8", "step"] = "fp16"
    """How a target is stored; FORMAT.md states each one's error."""
    step: float = Field(default=0.05, gt=0)
    """Step of the RMS-scaled integers of codec `step`."""


class Vision(Table):
    """Encoders over the images of a corpus, each image once."""

    encoder: tuple[Encoder, ...] = Field(min_length=1)
    images_per_shard: int = Field(default=64, ge=1)
    """Images between two commits."""
    batch: int = Field(default=16, ge=1)
    """Images of one forward pass. Where it divides `images_per_shard`, a capture that was
    interrupted has the bytes of one that was not; else it is the same but for rounding."""
    decoders: int = Field(default=4, ge=1)
    """Threads that open and resize images ahead of the encoders."""

    @model_validator(mode="after")
    def _names_differ(self) -> "Vision":
        names = [encoder.name for encoder in self.encoder]
        if len(set(names)) < len(names):
            raise ValueError("two encoders have the same name")
        return self
