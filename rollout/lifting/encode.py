"""Pictures as a pipeline's final latents: what it would have to denoise to, in order to decode to them.

The pipeline's own image processor sizes a picture, its autoencoder encodes it, and the pipeline's epilogue, run backwards
(`flowsteer.rollout.lifting.epilogue`), makes latents of that. Each picture is encoded by itself, so that its latents do not
depend on its company, and once: what the autoencoder makes of it is kept.

Left out: drawing from the autoencoder's posterior. The latents are its mode, the same each time.

Letters: T frames, X latent shape of one sample, Z the shape of what its autoencoder is given.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import __version__ as diffusers_version
from diffusers.image_processor import VaeImageProcessor
from torch import Tensor, nn

from flowsteer.rollout.data.inputs import Media
from flowsteer.rollout.lifting.conditioning import Conditioning
from flowsteer.rollout.lifting.epilogue import ADVICE, DecodeCall, LatentMap, decode_call, find_map
from flowsteer.rollout.lifting.kept import Kept
from flowsteer.rollout.lifting.pipeline import FlowPipeline

_PROCESSORS = ("image_processor", "video_processor")  # some pipelines have one for a network that sees under the first


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """A picture as the pipeline has it."""

    latents: Tensor  # [1, *X], on the pipeline's device
    pixels: (
        Tensor  # [1, 3, H, W] float32 in [0, 1] on the CPU, the picture in the pipeline's size; video [1, T, 3, H, W]
    )


@dataclass(frozen=True, kw_only=True)
class _Frame:
    """What is known of samples of one shape."""

    map: LatentMap
    autoencoder: nn.Module
    num_frames: int
    height: int
    width: int


class Encoder:
    """Encodes pictures for a pipeline.

    Args:
        pipeline: whose latents are made.
        dtype: of the latents.
        kept: where encoded pictures are kept; None keeps 1 GiB of them in memory.

    Raises:
        ValueError: the pipeline has no image processor of diffusers.
    """

    def __init__(self, pipeline: FlowPipeline, *, dtype: torch.dtype = torch.float32, kept: Kept | None = None) -> None:
        self.pipeline, self.dtype, self.kept = pipeline, dtype, kept or Kept()
        self.name = type(pipeline.pipe).__name__
        self._frames: dict[tuple[int, ...], _Frame] = {}
        self._hashes: dict[int, str] = {}
        found = [vars(pipeline.pipe).get(name) for name in _PROCESSORS]
        processors = [own for own in found if isinstance(own, VaeImageProcessor)]
        if not processors:
            raise ValueError(f"{self.name} has no image processor of diffusers: {ADVICE}")
        self.processor: Any = processors[0]

    def encode(self, picture: Media, row: Conditioning) -> Encoded:
        """A picture or a video as final latents of a row.

        Args:
            picture: of the kind ``image`` or ``video``. It is resized to cover the size that the row is drawn in, and what
                stands over at two sides is cut off.
            row: a conditioning of one row, which says how large its samples are.

        Raises:
            ValueError: a video of another length; a pipeline whose latents cannot be told from what it decodes.
        """
        with self.pipeline.loop.places.visit():
            return self._encode(picture, row)

    def _encode(self, picture: Media, row: Conditioning) -> Encoded:
        key = row.latent_shape
        known = self._frames.get(key)
        if known is not None and (encoded := self._through(known, picture, row)) is not None:
            return encoded
        self._frames[key] = self._frame(row)  # the first of its shape, or of one with as many numbers and other sides
        encoded = self._through(self._frames[key], picture, row)
        if encoded is None:
            raise ValueError(f"{self.name} decodes latents of one row in several ways: {ADVICE}")
        return encoded

    def _frame(self, row: Conditioning) -> _Frame:
        """Ask the epilogue: about twenty runs up to the autoencoder, and one through it."""
        found, call = find_map(self.pipeline, row, self.dtype)
        decoded = call.decoded()
        if decoded.dim() not in (4, 5) or decoded.shape[1] != 3:
            raise ValueError(f"the autoencoder of {self.name} decodes to {list(decoded.shape)}, no picture: {ADVICE}")
        return _Frame(
            map=found,
            autoencoder=call.autoencoder,
            num_frames=decoded.shape[2] if decoded.dim() == 5 else decoded.shape[0],
            height=decoded.shape[-2],
            width=decoded.shape[-1],
        )

    def _through(self, frame: _Frame, picture: Media, row: Conditioning) -> Encoded | None:
        """The picture by what is known of samples of this shape; None where the row's are not like that."""
        pixels = self._pixels(frame, picture)
        latents = frame.map.to_latents(self._encoded(frame, pixels)).to(self.dtype)
        if not frame.map.agrees(latents, self._decoded_from(latents, row).encoded):
            return None
        shown = (pixels / 2 + 0.5).clamp(0, 1) if self.processor.config.do_normalize else pixels
        return Encoded(latents=latents, pixels=shown[None] if picture.kind == "video" else shown)

    def _decoded_from(self, latents: Tensor, row: Conditioning) -> DecodeCall:
        return decode_call(self.pipeline, latents, row)

    def _pixels(self, frame: _Frame, picture: Media) -> Tensor:
        """The picture as the autoencoder takes it, [T, 3, H, W] float32."""
        given = picture.load()
        pictures = given if isinstance(given, list) else [given]
        if len(pictures) != frame.num_frames:
            raise ValueError(
                f"{picture} has {len(pictures)} frames, and {self.name} draws {frame.num_frames}; give it as many, or set "
                "its number of frames under model.call"
            )
        # sized here, since some processors do not; by VaeImageProcessor's own preprocess, since the one of a pipeline may be
        # for the pictures that it is shown
        sized = [self.processor.resize(own, frame.height, frame.width, resize_mode="crop") for own in pictures]
        pixels = VaeImageProcessor.preprocess(self.processor, sized, frame.height, frame.width).float()
        if tuple(pixels.shape) != (frame.num_frames, 3, frame.height, frame.width):
            raise ValueError(f"the image processor of {self.name} gives {list(pixels.shape)} for {picture}: {ADVICE}")
        return pixels

    def _encoded(self, frame: _Frame, pixels: Tensor) -> Tensor:
        """What the autoencoder makes of pixels [T, 3, H, W]: [*Z], from memory or disk where it is there."""
        autoencoder, shape = frame.autoencoder, frame.map.encoded_shape

        def encode() -> Tensor:
            with torch.no_grad(), self.pipeline.loop.places.visit():
                self.pipeline.loop.places.fetch_all(self.pipeline.loop.autoencoders)
                weight = next(autoencoder.parameters())
                given = pixels.to(weight.device, weight.dtype)
                mode = mode_of(autoencoder.encode(_arranged(given, shape)))  # type: ignore[operator]
            if tuple(mode.shape) != shape:
                raise ValueError(
                    f"the autoencoder of {self.name} encodes to {list(mode.shape)} what it decodes from {list(shape)}: "
                    f"{ADVICE}"
                )
            return mode

        said = f"{self._hash(autoencoder)} {_platform(self.pipeline.device)} {tuple(pixels.shape)} {shape}".encode()
        digest = hashlib.sha256(said + pixels.numpy().tobytes()).hexdigest()
        return self.kept.get(digest, encode, shape)

    def _hash(self, autoencoder: nn.Module) -> str:
        if id(autoencoder) not in self._hashes:
            self._hashes[id(autoencoder)] = hash_of(autoencoder)
        return self._hashes[id(autoencoder)]


def mode_of(answer: Any) -> Tensor:
    """The latents in what an autoencoder's ``encode`` gives: the mode of a distribution, or the latents themselves."""
    if "latent_dist" in answer:
        return answer.latent_dist.mode()
    return answer["latent"] if "latent" in answer else answer["latents"]


def hash_of(network: nn.Module) -> str:
    """A hash of all of a network's weights and settings, without what diffusers notes beside them, such as where it lay."""
    settings = {name: value for name, value in dict(getattr(network, "config", {})).items() if not name.startswith("_")}
    digest = hashlib.sha256(str(sorted(settings.items(), key=str)).encode())
    for name, value in sorted(network.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _platform(device: torch.device) -> str:
    """What the last bits of an encoding depend on besides weights and pixels."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else torch.backends.cpu.get_cpu_capability()
    return f"torch {torch.__version__} diffusers {diffusers_version} {device.type} {name}"


def _arranged(pixels: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Frames [T, 3, H, W] as an autoencoder with encodings of this shape takes them: one by one, or as [1, 3, T, H, W]."""
    return pixels.transpose(0, 1)[None] if len(shape) == 5 else pixels
