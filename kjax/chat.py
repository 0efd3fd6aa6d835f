"""Talking to a model in a terminal: one message, or a conversation with the replies as they are written."""

import sys
from collections.abc import Callable
from typing import TextIO

HELP = "/reset forgets the conversation, /quit or Ctrl-D ends it, Ctrl-C stops a reply"


def reply(generate: Callable, messages: list[dict], out: TextIO) -> str:
    """Writes the model's answer as it comes and returns it. generate(messages, stream=...) -> str."""
    def stream(piece: str):
        out.write(piece)
        out.flush()
    answer = generate(messages, stream=stream)
    out.write("\n")
    out.flush()
    return answer


def converse(generate: Callable, messages: list[dict], source: TextIO = sys.stdin, out: TextIO = sys.stdout):
    """A conversation until the end of the input. `messages` is what precedes it, such as a system message."""
    start = list(messages)
    prompt = "> " if source.isatty() else ""
    out.write(f"{HELP}\n" if prompt else "")
    while True:
        out.write(prompt)
        out.flush()
        line = source.readline()
        if not line or line.strip() in ("/quit", "/exit"):
            out.write("\n" if prompt and not line else "")
            return
        line = line.strip()
        if line == "/reset":
            messages = list(start)
        elif line.startswith("/"):
            out.write(f"{HELP}\n")
        elif line:
            asked = [*messages, {"role": "user", "content": line}]
            try:
                messages = [*asked, {"role": "assistant", "content": reply(generate, asked, out)}]
            except KeyboardInterrupt:  # the reply, not the program; the exchange is forgotten
                out.write("\n(stopped)\n")
