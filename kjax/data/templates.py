"""Chat templates: where they come from, and rendering them in a process of their own."""

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from kjax.errors import DataError

# A render takes well under a millisecond of processor time and a few kilobytes; these bounds are for runaways.
CPU_SECONDS = 2.0
WALL_SECONDS = 60.0  # of silence; only for a machine so busy that 2 s of processor time do not come sooner
MEMORY = 1 << 30
OUTPUT_CHARACTERS = 1 << 20  # beside 16 times the conversation's own length

_DIRECTORY = Path(__file__).parent / "chat_templates"
# Other names of a dialogue: LLaMA-Factory's, and those of models that share it.
_ALIASES = {"deepseek": "deepseek2", "deepseek32": "deepseek31", "kimi": "kimi_k2", "moonlight": "kimi_k2",
            "kimi_thinking": "kimi_k2_thinking", "glm4.5": "glm4_moe", "glm4.6": "glm4_moe"}
_KIMI = ("<|im_system|>", "<|im_user|>", "<|im_assistant|>", "<|im_middle|>", "<|im_end|>")
_DEEPSEEK = ("<｜begin▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>", "<｜end▁of▁sentence｜>")
_THINK = ("<think>", "</think>")
# The special tokens without which a packaged template would come out as ordinary text; of the templates that a
# tokenizer has all tokens for, the first and others that need the same are suggested where the model's own loses text.
_REQUIRED = {
    "kimi_k25": (*_KIMI, *_THINK),
    "kimi_k2_thinking": (*_KIMI, *_THINK),
    "kimi_k2": _KIMI,
    "deepseekr1": (*_DEEPSEEK, *_THINK),
    "deepseek31": (*_DEEPSEEK, *_THINK),
    "deepseek3": _DEEPSEEK,
    "deepseek2": ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"),
    "qwen3": ("<|im_start|>", "<|im_end|>", *_THINK),
    "qwen3_nothink": ("<|im_start|>", "<|im_end|>"),
    "glm4_moe": ("[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", *_THINK),
}


OF_ADAPTER = "chat_template.jinja"  # beside an adapter: the one that it was trained with


def of_adapter(directory: str | os.PathLike | None) -> str | None:
    """The file of the chat template that an adapter was trained with, where it has one."""
    path = Path(directory) / OF_ADAPTER if directory is not None else None
    return str(path) if path is not None and path.is_file() else None


@dataclass(frozen=True)
class Template:
    """Jinja source and the name a message can give it."""

    name: str
    source: str


def packaged() -> list[str]:
    """Names that `data.template` accepts beside a path."""
    return sorted(path.stem for path in _DIRECTORY.glob("*.jinja"))


def suggestions(specials: Mapping[str, int]) -> list[str]:
    """The packaged templates whose markers a tokenizer has; none that do with fewer beside those."""
    found = next((needed for needed in _REQUIRED.values() if all(token in specials for token in needed)), None)
    return [name for name, needed in _REQUIRED.items() if needed == found]


def find(name: str | None, directory: Path, settings: Mapping, specials: Mapping[str, int]) -> Template | None:
    """A packaged name, another name of it, or a .jinja file; None: the model's own (chat_template.jinja, else
    tokenizer_config.json)."""
    if name is None:
        path = directory / "chat_template.jinja"
        if path.is_file():
            return Template(str(path), _read(path))
        return _own(settings.get("chat_template"), directory / "tokenizer_config.json")
    if name.endswith(".jinja"):
        return Template(name, _read(Path(name)))
    known = packaged()
    stem = _ALIASES.get(name, name)
    if stem not in known:
        raise DataError(f"data.template = {name!r}: no .jinja file and not packaged; packaged are {', '.join(known)} "
                        f"({', '.join(f'{alias} is {stem}' for alias, stem in _ALIASES.items())})")
    if absent := [token for token in _REQUIRED[stem] if token not in specials]:
        raise DataError(f"data.template = {name!r}: the tokenizer in {directory} lacks its markers "
                        f"{', '.join(absent)}; this template belongs to another model")
    return Template(stem, _read(_DIRECTORY / f"{stem}.jinja"))


def _read(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"chat template {path}: {error}") from error


def _own(value, path: Path) -> Template | None:
    if isinstance(value, list):  # several named templates; "default" is the dialogue
        value = next((v.get("template") for v in value if isinstance(v, dict) and v.get("name") == "default"), None)
    if value is not None and not isinstance(value, str):
        raise DataError(f"{path}: chat_template must be text")
    return Template(str(path), value) if value is not None else None


class Renderer:
    """A process that renders one template; a context manager, so that it never outlives its use."""

    def __init__(self, template: Template, variables: Mapping[str, str]):
        self.template = template
        program = Path(__file__).with_name("sandbox.py")
        # -P keeps this directory off the import path of the process.
        self._process = subprocess.Popen([sys.executable, "-P", str(program)], stdin=subprocess.PIPE,
                                         stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        self._buffer = bytearray()
        self._limit = len(template.source) + OUTPUT_CHARACTERS
        try:
            self._send({"template": template.source, "variables": dict(variables), "seconds": CPU_SECONDS,
                        "memory": MEMORY})
            reply = self._receive("")
            if "error" in reply:
                raise DataError(f"chat template {template.name}: {reply['error']}")
            self.marks_generation: bool = reply["marks_generation"]
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "Renderer":
        return self

    def __exit__(self, *_):
        self.close()

    def close(self):
        """Ends the process, whatever it is doing."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout, self._process.stderr):
            try:
                pipe.close()
            except BrokenPipeError:  # a line that the process did not live to read
                pass

    def render(self, requests: Sequence[Mapping], where: Sequence[str]) -> list[str]:
        """The text of each request, a template's variables; where[i] names request i in errors."""
        limits = [OUTPUT_CHARACTERS + 16 * len(json.dumps(dict(request))) for request in requests]
        self._limit = 12 * max(limits, default=0) + 1024  # JSON may write a character beyond the basic plane as 12
        # One line for all: the process reads it whole before it answers, so that neither side waits for the other.
        self._send([{"variables": dict(r), "limit": limit} for r, limit in zip(requests, limits, strict=True)])
        texts = []
        for name in where:
            reply = self._receive(f" on {name}")
            if "error" in reply:
                raise DataError(f"chat template {self.template.name} fails on {name}: {reply['error']}")
            texts.append(reply["text"])
        return texts

    def _send(self, request):
        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # the reply, or its absence, says why

    def _receive(self, on: str) -> dict:
        deadline = time.monotonic() + WALL_SECONDS
        descriptor = self._process.stdout.fileno()
        while (end := self._buffer.find(b"\n")) < 0:
            if len(self._buffer) > self._limit:
                raise DataError(f"chat template {self.template.name} writes without end{on}")
            if not select.select([descriptor], [], [], max(0.0, deadline - time.monotonic()))[0]:
                raise DataError(f"chat template {self.template.name} does not finish{on}: no reply in "
                                f"{WALL_SECONDS:g} s")
            if not (data := os.read(descriptor, 1 << 16)):
                raise DataError(f"chat template {self.template.name} {self._cause_of_death()}{on}")
            self._buffer += data
        line = bytes(self._buffer[:end])
        del self._buffer[: end + 1]
        return json.loads(line)

    def _cause_of_death(self) -> str:
        code = self._process.wait()
        if code == -signal.SIGPROF:
            return f"does not finish: stopped after {CPU_SECONDS:g} s of processor time"
        said = self._process.stderr.read(4096).decode(errors="replace").strip().rpartition("\n")[2]
        return f"ended its renderer (exit status {code}){': ' + said if said else ''}"
