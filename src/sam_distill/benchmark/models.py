"""Benchmarks of a model: parameters, image encoder, mask decoder, and the whole way from an image to a mask."""

from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sam_distill.benchmark.peak import gflop_of, with_share_of_peak
from sam_distill.benchmark.peers import MISSING, peer_of
from sam_distill.benchmark.tables import Finding
from sam_distill.benchmark.timing import Contender, time_in_turns
from sam_distill.data.base import collate
from sam_distill.export.contract import Settings, contracts
from sam_distill.export.formats import FORMATS, load_format
from sam_distill.fastsam.model import FastSam
from sam_distill.images import frame_size, to_frame
from sam_distill.inference.optimize import optimize_for_inference
from sam_distill.models.sam import Sam
from sam_distill.predict.predictor import SamPredictor
from sam_distill.prompts.forms import point_prompts
from sam_distill.types import FRAME, MULTI, Sample

SIZE = (683, FRAME)  # (h, w) of a 3:2 photograph in the frame
PROMPTS = (1, 64)
OURS = "sam-distill"
FP32, BF16 = f"{OURS}, fp32", f"{OURS}, bf16"
PAPER_PARAMETERS = "paper, Table 1: ViT-H 632M, ViT-L 307M, ViT-B 86M, prompt encoder 0.006M"
PAPER_ENCODER = "paper, Table 3, one GPU: ViT-H 632M parameters, 452 ms; MobileSAM 5.78M parameters, 8 ms"
PAPER_DECODER = "paper, section 1, one GPU: 4 ms for one prompt"
PAPER_IMAGE = "paper, Table 6, one GPU: MobileSAM 12 ms, FastSAM 64 ms"


@torch.no_grad()
def bench_encoder(
    sam: Sam, device: str, compiled: bool, onnx: bool, exported: Path | None, peak: Finding, seconds: float
) -> Finding:
    """Measure the image encoder on one image of 1024 x 683, with normalising and padding, in fp32 and in bf16.

    On a CPU, OpenVINO and other runtimes are measured, too.
    exported: folder of an export of this model, or of several, to run. onnx: without it, run a temporary ONNX file.
    """
    image, sizes = _image(device)
    sam = sam.to(device).to(memory_format=torch.channels_last)
    as_it_trains, fast = partial(sam.encode, image, sizes), optimize_for_inference(sam)
    contenders = _fp32_and_bf16(OURS, device, partial(fast.encode, image, sizes))
    if compiled:
        twin = deepcopy(fast)
        twin.image_encoder = torch.compile(twin.image_encoder)  # type: ignore[assignment]
        contenders.append(Contender(f"{BF16}, torch.compile", _in_bf16(device, partial(twin.encode, image, sizes))))
    contenders.append(Contender("the same model as it trains, fp32", as_it_trains))
    notes = []
    if device == "cpu" and exported:
        for contender, about in exported_encoders(exported):
            contenders.append(contender)
            notes.append(about)
    elif onnx and device == "cpu" and find_spec("onnx") and find_spec("onnxruntime") and find_spec("onnxscript"):
        contenders.append(_onnx_encoder(sam))
    if device == "cpu" and find_spec("openvino"):
        with_openvino = optimize_for_inference(sam, "openvino")
        contenders += _fp32_and_bf16(f"{OURS}, OpenVINO", device, partial(with_openvino.encode, image, sizes))
    peer = peer_of(sam, device)
    if peer is not None:
        model, pixels = peer.model, image[..., : SIZE[0], :].float()
        contenders.append(Contender(peer.name, lambda: model.image_encoder(model.preprocess(pixels)), ours=False))
    gflop = gflop_of(as_it_trains)
    facts = f"{sam.parameter_counts['parameters'] / 1e6:.2f}M parameters, {gflop / 2:.1f} GMACs"
    what = f"Image encoder at {sam.image_size} px, {device}: {facts}"
    note = "\n".join([*notes, *([] if peer else [MISSING]), PAPER_ENCODER])
    finding = Finding(what, "image", time_in_turns(contenders, device, seconds), note)
    return _with_times(with_share_of_peak(finding, peak, gflop, FP32, BF16), "encoder_ms")


def _onnx_encoder(sam: Sam) -> Contender:
    from sam_distill.export import onnx
    from sam_distill.export.graphs import prepared
    from sam_distill.export.sam_layout import AnySizeEncoder

    with TemporaryDirectory() as place:
        file = Path(place) / onnx.ENCODER
        onnx.write_graph(AnySizeEncoder(prepared(sam)), file)
        session = onnx.open_session(file)
    return Contender("sam-distill, ONNX Runtime, fp32", partial(session.run, None, onnx.encoder_input(_sample())))


def exported_encoders(folder: Path) -> Iterator[tuple[Contender, str]]:
    """Yield a contender for each export with a runtime here, and a line on its size and mask IoU with PyTorch."""
    for file in contracts(folder):
        settings, content = Settings.read(file)
        if FORMATS[settings.format].runtime is None:
            continue
        runner = load_format(settings.format).open_runner(file.parent, settings)
        name = f"sam-distill, {settings.format}, {settings.quantize or 'fp32'}"
        size = sum((file.parent / content[graph]["file"]).stat().st_size for graph in ("encoder", "decoder"))
        about = f"{name}: {size / 1e6:.1f} MB with the decoder, mask IoU {content['checked']['mask_iou']:.4f}"
        yield Contender(name, partial(runner.encode, _sample())), about


@torch.no_grad()
def bench_decoder(sam: Sam, device: str, peak: Finding, seconds: float) -> Iterator[Finding]:
    """Measure prompt encoder and mask decoder on point prompts on one image: three masks of low-res logits each."""
    peer, (image, sizes) = peer_of(sam, device), _image(device)
    sam = optimize_for_inference(sam).to(device)
    embedding = sam.encode(image, sizes)
    for count in PROMPTS:
        points = torch.rand(count, 1, 2, generator=torch.Generator().manual_seed(0)).to(device)
        points = points * torch.tensor(SIZE[::-1], device=device)
        labels = torch.ones(count, 1, dtype=torch.int64, device=device)
        prompts = point_prompts(points[None], labels[None])

        decode = partial(sam.decode, embedding, prompts, MULTI)
        contenders = _fp32_and_bf16(OURS, device, decode, count)
        if peer is not None:
            run = _peer_decoder(peer.model, embedding, points, labels)
            contenders.append(Contender(peer.name, run, count, ours=False))
        what = f"Mask decoder, {count} point prompt{'s' * (count > 1)} on one image, {device}"
        what += f": {sam.parameter_counts['parameters/mask_decoder'] / 1e6:.2f}M parameters"
        finding = Finding(
            what, "prompt", time_in_turns(contenders, device, seconds), PAPER_DECODER if peer else MISSING
        )
        yield with_share_of_peak(finding, peak, gflop_of(decode) / count, FP32, BF16)


def bench_image(sam: Sam, photograph: np.ndarray, device: str, seconds: float) -> Finding:
    """Measure the way from a photograph, [H, W, 3] uint8, to the mask for a point on it, resizing included."""
    sam, middle = sam.to(device).to(memory_format=torch.channels_last), np.array([photograph.shape[1::-1]]) / 2

    def ask(predictor: Any) -> None:
        predictor.set_image(photograph)
        predictor.predict(middle, np.array([1]), multimask_output=False)

    ours, peer = partial(ask, SamPredictor(sam)), peer_of(sam, device)
    contenders = _fp32_and_bf16(OURS, device, ours)
    if peer is not None:
        theirs = partial(ask, peer.package.SamPredictor(peer.model))
        contenders.append(Contender(peer.name, theirs, ours=False))
    finding = Finding(
        _mask_title(photograph, device),
        "image",
        time_in_turns(contenders, device, seconds),
        PAPER_IMAGE if peer else MISSING,
    )
    return _with_times(finding, "image_ms")


def bench_fastsam(model: FastSam, photograph: np.ndarray, device: str, seconds: float) -> Finding:
    """Measure a FastSAM as `bench_image` does a SAM; one prompt takes it as long as segmenting everything."""
    height, width = frame_size(photograph.shape[:2])
    click = point_prompts(torch.tensor([[[[width / 2, height / 2]]]])).to(device)
    name = "FastSAM, ultralytics, fp32"

    def run() -> Tensor:
        picture = Image.fromarray(photograph)
        sample = Sample("photograph", to_frame(picture), (picture.height, picture.width))
        return model.view(collate([sample]).to(device)).masks(click)(0, 0)

    finding = Finding(
        _mask_title(photograph, device),
        "image",
        time_in_turns([Contender(name, run, ours=False)], device, seconds),
        PAPER_IMAGE,
    )
    parameters = model.description["parameters/model"]
    return replace(finding, metrics={"image_ms": finding.milliseconds(name), "parameters/model": parameters})


def parameter_finding(sam: Sam) -> Finding:
    encoder, prompts, decoder, model = (f"{number / 1e6:,.3f}M" for number in sam.parameter_counts.values())
    what = f"Parameters: image encoder {encoder}, prompt encoder {prompts}, mask decoder {decoder}, together {model}"
    return Finding(what, note=PAPER_PARAMETERS, metrics=dict(sam.parameter_counts))


def _fp32_and_bf16(name: str, device: str, run: Callable[[], object], units: float = 1) -> list[Contender]:
    """Return two contenders that run the same code, in fp32 and in bf16."""
    return [Contender(f"{name}, fp32", run, units), Contender(f"{name}, bf16", _in_bf16(device, run), units)]


def _in_bf16(device: str, run: Callable[[], object]) -> Callable[[], object]:
    def within() -> object:
        with torch.autocast(device, dtype=torch.bfloat16):
            return run()

    return within


def _peer_decoder(model: Any, embedding: Tensor, points: Tensor, labels: Tensor) -> Callable[[], object]:
    def run() -> object:
        sparse, dense = model.prompt_encoder(points=(points, labels), boxes=None, masks=None)
        return model.mask_decoder(
            image_embeddings=embedding,
            image_pe=model.prompt_encoder.get_dense_pe(),
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
            multimask_output=True,
        )

    return run


def _sample() -> Sample:
    """Return an image of noise: the time that a network takes does not depend on the content."""
    noise = torch.randint(0, 256, (3, *SIZE), generator=torch.Generator().manual_seed(0))
    return Sample("noise", noise.byte(), SIZE)


def _image(device: str) -> tuple[Tensor, Tensor]:
    batch = collate([_sample()]).to(device)
    return batch.images, batch.sizes


def _with_times(finding: Finding, name: str) -> Finding:
    return replace(finding, metrics={name: finding.milliseconds(FP32), f"{name}/bf16": finding.milliseconds(BF16)})


def _mask_title(photograph: np.ndarray, device: str) -> str:
    return f"From a {photograph.shape[1]} x {photograph.shape[0]} photograph to the mask for a point, {device}"
