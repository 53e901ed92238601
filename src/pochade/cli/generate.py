"""`pochade generate`: a prompt becomes a picture file."""

from __future__ import annotations

import argparse
import inspect
import json
import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from pochade.cli.options import add_json, add_verbosity
from pochade.cli.progress import ProgressBar
from pochade.cli.text import printable
from pochade.errors import OutputError, UsageError
from pochade.sizes import read_picture_size

if TYPE_CHECKING:
    from pochade.runtime.pipeline import Pipeline, Result

T = TypeVar("T")

MAX_STDIN = 1 << 20

OPTIONS = {"image": "init-image", "controlnet_conditioning_scale": "control-strength"}
"""Options of other names than the arguments that they stand for, among those that not every family takes."""


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verb."""
    parser = subparsers.add_parser(
        "generate",
        help="paint a picture from a prompt",
        description="Paint a picture from a prompt. The path of every picture goes to stdout.",
    )
    parser.add_argument("words", nargs="?", metavar="PROMPT", help="what to paint; - reads it from stdin")
    parser.add_argument("-p", "--prompt", help="the same as an option")
    parser.add_argument("-n", "--negative-prompt", help="what to avoid (default: the bundle's; '' for none)")
    parser.add_argument("-m", "--model", default="starter", help="bundle folder or installed name (default: starter)")
    parser.add_argument("-W", "--width", type=int, help="pixels")
    parser.add_argument("-H", "--height", type=int, help="pixels")
    parser.add_argument("--size", help="both at once, e.g. 1024x768")
    parser.add_argument("--steps", type=int, help="denoise steps")
    parser.add_argument("--guidance", "--cfg-scale", type=float, help="how strictly to follow the prompt; 1 is off")
    parser.add_argument("--guidance-rescale", type=float, help="how much of guidance's contrast to take back, 0 to 1")
    parser.add_argument("--sampler", help="ddpm, ddim or dpm-solver, for diffusion models (default: the bundle's)")
    parser.add_argument(
        "-i", "--init-image", type=Path, metavar="FILE", help="picture to begin with, for diffusion models"
    )
    parser.add_argument("--strength", type=float, help="share of the steps to take on --init-image (default: 0.8)")
    parser.add_argument(
        "--lora",
        action="append",
        default=[],
        metavar="FILE[:SCALE]",
        help="adapter to paint with, as strong as SCALE says (default: 1); may be given several times",
    )
    parser.add_argument(
        "--lora-partial", action="store_true", help="use what fits of an adapter, where the rest would refuse it"
    )
    parser.add_argument(
        "--controlnet",
        action="append",
        metavar="BUNDLE",
        help="ControlNet that makes the painting follow --control-image; more of them add up",
    )
    parser.add_argument(
        "--control-image",
        type=Path,
        action="append",
        metavar="FILE",
        help="map of edges, depth or pose; one for all ControlNets, or one each in their order",
    )
    parser.add_argument(
        "--control-strength",
        type=float,
        action="append",
        metavar="SCALE",
        help="how strictly to follow it, one for all or one each (default: the ControlNet's)",
    )
    parser.add_argument(
        "--control-preprocess",
        choices=("canny",),
        help="make a map of a photo: canny, of its edges",
    )
    parser.add_argument("--temperature", help="noise in the choice of tokens, e.g. 2 or 2,0 (first and last step)")
    parser.add_argument("-s", "--seed", type=int, default=-1, help="of the first picture; -1 draws one (default)")
    parser.add_argument("-b", "--batch-count", type=int, default=1, help="pictures to paint (default: 1)")
    parser.add_argument(
        "-o",
        "--output",
        default="pochade-{seed}.png",
        help="file name; {seed} and {index} are filled in (default: pochade-{seed}.png)",
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or webgpu (default: auto)")
    parser.add_argument("--threads", type=int, help="CPU threads (default: all cores of this process)")
    parser.add_argument("--ram", help="most memory the program may take, e.g. 1G (default: no limit)")
    parser.add_argument(
        "--packed-cache", metavar="SIZE", help="disk for weights as the CPU multiplies them, to open faster next time"
    )
    parser.add_argument("--vram", help="most memory of a card that it may take, e.g. 4G (default: no limit)")
    parser.add_argument(
        "--cuda-graphs", action="store_true", help="on CUDA, start each pass of the transformer as a whole"
    )
    parser.add_argument(
        "--tiling",
        default="auto",
        choices=("auto", "on", "off"),
        help="decode in strips, with least memory (on), or all at once (off); the same picture, up to rounding",
    )
    parser.add_argument(
        "--expand",
        default="auto",
        choices=("auto", "on", "off"),
        help="compute with weights of 4 bits as 8-bit ones, in less time and more memory (default: auto)",
    )
    parser.add_argument("--no-metadata", action="store_true", help="do not write prompt and settings into the picture")
    add_json(parser, "settings, timings, peak memory and providers as JSON, instead of the paths")
    add_verbosity(parser)
    parser.set_defaults(func=run)


def run(arguments: argparse.Namespace) -> int:
    """Paint what the arguments say."""
    import pochade

    prompt = _prompt(arguments)
    width, height = _size(arguments)
    if arguments.lora_partial and not arguments.lora:
        raise UsageError("--lora-partial says how to take a --lora; give that too")
    if arguments.strength is not None and arguments.init_image is None:
        raise UsageError("--strength says how far to leave --init-image; give that too")
    _check_control(arguments)
    targets = _Targets(arguments.output, arguments.batch_count)
    limits = {"ram": arguments.ram, "vram": arguments.vram, "tiling": arguments.tiling}
    limits["expand"] = arguments.expand
    limits["packed_cache"] = arguments.packed_cache
    limits["cuda_graphs"] = arguments.cuda_graphs
    limits["controlnets"] = arguments.controlnet or ()
    with pochade.load(arguments.model, device=arguments.device, threads=arguments.threads, **limits) as pipe:
        for path, scale in map(_lora, arguments.lora):
            lora = pipe.load_lora(path, scale, partial=arguments.lora_partial)
            if not arguments.quiet:
                print(f"note: {printable(str(lora))}", file=sys.stderr)
        result = _paint(
            pipe,
            arguments,
            prompt=prompt,
            negative_prompt=arguments.negative_prompt,
            width=width,
            height=height,
            num_inference_steps=arguments.steps,
            guidance_scale=arguments.guidance,
            guidance_rescale=arguments.guidance_rescale,
            sampler=arguments.sampler,
            image=_image(arguments.init_image),
            strength=arguments.strength,
            control_image=_control_images(arguments, width, height, pipe),
            controlnet_conditioning_scale=_one_or_all(arguments.control_strength),
            temperature=_temperature(arguments.temperature),
            num_images_per_prompt=arguments.batch_count,
            seed=arguments.seed,
        )
    paths = _save(result, targets, metadata=not arguments.no_metadata)
    _report(result, paths, arguments)
    return 0


def _paint(pipe: Pipeline, arguments: argparse.Namespace, **given: Any) -> Result:
    from pochade.runtime.pipeline import StepEvent

    settings = {name: value for name, value in given.items() if value is not None}
    for name in settings.keys() - inspect.signature(pipe.stream).parameters.keys():
        family, option = pipe.bundle.manifest.family, OPTIONS.get(name, name.replace("_", "-"))
        raise UsageError(f"--{option} means nothing to {arguments.model}, a model of {family}; drop it")
    with ProgressBar(quiet=bool(arguments.quiet)) as bar:
        events = pipe.stream(**settings)
        if arguments.verbose and pipe.plan is not None:
            print("\n".join(pipe.plan.lines()), file=sys.stderr)
        bar.update("reading the prompt", 0, 0)
        for event in events:
            if not isinstance(event, StepEvent):
                return event
            bar.update("painting", event.index, event.total)
            if event.index == event.total:
                bar.update("decoding", 0, 0)
    raise AssertionError("stream ended without a result")


def _save(result: Result, targets: _Targets, metadata: bool) -> list[Path]:
    from pochade.runtime.image import save_image

    paths = []
    for index, (image, seed) in enumerate(zip(result.images, result.seeds, strict=True)):
        path = targets.path(seed, index)
        save_image(image, path, {**result.settings, "seed": seed} if metadata else None)
        paths.append(path)
    return paths


def _report(result: Result, paths: list[Path], arguments: argparse.Namespace) -> None:
    notes = list(result.notes)
    if not arguments.no_metadata and paths[0].suffix.lower() != ".png":
        notes.append(f"{paths[0].suffix} files carry no prompt and settings, PNG files do")
    for note in notes:
        print(f"note: {printable(note)}", file=sys.stderr)
    if arguments.json:
        fields = ("seeds", "timings", "peak_memory", "providers", "notes")
        report = {"files": [str(path) for path in paths], "settings": dict(result.settings)}
        print(json.dumps(report | {name: getattr(result, name) for name in fields}, ensure_ascii=False, indent=2))
        return
    for path in paths:
        print(path)
    # The seed is told even to those who want to hear nothing: without it a picture cannot be painted again.
    summary = "" if arguments.quiet else f"  {result.timings['total']:.2f} s on {result.settings['device']}"
    print(f"seed {', '.join(map(str, result.seeds))}{summary}", file=sys.stderr)
    if arguments.verbose:
        phases = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in result.timings.items())
        peak = f"; peak memory {result.peak_memory / 1e6:.0f} MB" if result.peak_memory else ""
        print(f"{phases}{peak}", file=sys.stderr)


class _Targets:
    """File names from the pattern; a wrong one is found before painting, not after."""

    def __init__(self, pattern: str, count: int) -> None:
        self._pattern = pattern
        unknown = set(re.findall(r"\{(.*?)\}", pattern)) - {"seed", "index"}
        if unknown:
            raise UsageError(f"output pattern has {{{sorted(unknown)[0]}}}; only {{seed}} and {{index}} are filled in")
        if count > 1 and not re.search(r"\{(seed|index)\}", pattern):
            raise UsageError(f"{count} pictures would all be {pattern}; put {{seed}} or {{index}} into --output")
        if "\0" in pattern:
            raise UsageError("the output name holds a NUL character; remove it")
        first = self.path(0, 0)
        if not first.parent.is_dir():
            raise OutputError(f"cannot write {first}: there is no folder {first.parent}; make it first")
        if not os.access(first.parent, os.W_OK):
            raise OutputError(f"cannot write {first}: the folder {first.parent} is not writable; choose another")
        if first.is_dir():
            raise OutputError(f"cannot write {first}: it is a folder; give a file name such as {first / 'picture.png'}")
        if first.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
            raise UsageError(f"output {pattern} does not end in .png, .jpg or .webp")

    def path(self, seed: int, index: int) -> Path:
        return Path(self._pattern.replace("{seed}", str(seed)).replace("{index}", str(index)))


def _prompt(arguments: argparse.Namespace) -> str:
    given = [text for text in (arguments.words, arguments.prompt) if text is not None]
    if len(given) != 1:
        raise UsageError('give one prompt: pochade generate "a red star"' if not given else "two prompts were given")
    if given[0] != "-":
        return str(given[0])
    if sys.stdin is None:  # as it is in windowed programs
        raise UsageError("there is no stdin to read the prompt from")
    text = sys.stdin.buffer.read(MAX_STDIN + 1)
    if len(text) > MAX_STDIN:
        raise UsageError(f"the prompt on stdin is longer than {MAX_STDIN} bytes; shorten it")
    try:
        # Some programs on Windows put a byte order mark first.
        return text.decode("utf-8-sig").strip()
    except UnicodeDecodeError:
        raise UsageError("the prompt on stdin is not UTF-8 text") from None


def _size(arguments: argparse.Namespace) -> tuple[int | None, int | None]:
    if arguments.size is None:
        return arguments.width, arguments.height
    size = read_picture_size(arguments.size)
    if arguments.width is not None or arguments.height is not None:
        raise UsageError("give --size or --width and --height, not both")
    return size


def _lora(text: str) -> tuple[Path, float]:
    """File and scale; a colon that no number follows belongs to the name."""
    name, _, tail = text.rpartition(":")
    try:
        return (Path(name), float(tail)) if name else (Path(text), 1.0)
    except ValueError:
        return Path(text), 1.0


def _image(path: Path | None) -> Any:
    if path is None:
        return None
    from pochade.runtime.image import open_image

    return open_image(path)


def _check_control(arguments: argparse.Namespace) -> None:
    """Whether what is said about control images belongs to any."""
    if arguments.control_image is None:
        for name in ("controlnet", "control_strength", "control_preprocess"):
            if getattr(arguments, name) is not None:
                raise UsageError(f"--{name.replace('_', '-')} needs a picture to follow; give --control-image too")


def _control_images(arguments: argparse.Namespace, width: int | None, height: int | None, pipe: Pipeline) -> Any:
    """Control images as the pipeline takes them, made into maps where that is asked for."""
    if arguments.control_image is None:
        return None
    from pochade.runtime.image import open_image

    images = [open_image(path) for path in arguments.control_image]
    if arguments.control_preprocess is not None:
        from pochade.runtime.canny import canny

        # At the size that is painted: lines of a larger picture would fade when they are brought to it.
        defaults = pipe.bundle.manifest.defaults
        size = (width or int(defaults["width"]), height or int(defaults["height"]))
        images = [canny(image.resize(size)) for image in images]
    return _one_or_all(images)


def _one_or_all(values: list[T] | None) -> T | list[T] | None:
    """A single value by itself, which then stands for all."""
    return values[0] if values is not None and len(values) == 1 else values


def _temperature(text: str | None) -> tuple[float, float] | float | None:
    if text is None:
        return None
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        values = []
    if len(values) not in (1, 2):
        raise UsageError(f"temperature {text!r} is neither a number nor two with a comma, e.g. 2,0")
    return (values[0], values[1]) if len(values) == 2 else values[0]
