"""The program of the process that renders chat templates: code from strangers runs apart, sandboxed and bounded.

It speaks JSON lines. The first line names the template, its variables and the limits; the reply says whether the
template marks generated text. Each further line is a list of dialogues; the reply is a line for each, its text or an
error. Processor time is bounded by a timer whose signal ends the process even inside a single long operation, memory
by the address space, so that the parent sees the end of the pipe and nothing outlives a runaway template. It imports
nothing of kjax.
"""

import json
import resource
import signal
import sys

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment


class Generation(Extension):
    """`{% generation %}...{% endgeneration %}`: puts marks around what the assistant writes."""

    tags = {"generation"}

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        self.environment.marks_generation = True
        start, end = (nodes.Output([nodes.Name(name, "load")]) for name in ("generation_start", "generation_end"))
        return [start.set_lineno(line), *body, end.set_lineno(line)]


def _raise_exception(message):
    raise TemplateError(message)


def _tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    """Plain JSON: Jinja's own filter escapes <, > and & for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def environment() -> ImmutableSandboxedEnvironment:
    """Whitespace rules, filters and functions that published chat templates rely on."""
    env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True,
                                        extensions=[Generation, "jinja2.ext.loopcontrols"])
    env.marks_generation = False
    env.filters["tojson"] = _tojson
    env.globals["raise_exception"] = _raise_exception
    return env


def _render(template, variables: dict, limit: int) -> str:
    pieces, size = [], 0
    for piece in template.generate(**variables):
        pieces.append(piece)
        size += len(piece)
        if size > limit:
            raise TemplateError(f"writes more than {limit:,} characters")
    return "".join(pieces)


def main():
    """Serves one template until the input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    signal.signal(signal.SIGPROF, signal.SIG_DFL)  # to end the process; a parent may have left it ignored or blocked
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGPROF])
    setup = json.loads(sys.stdin.readline())
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    memory = setup["memory"] if hard == resource.RLIM_INFINITY else min(setup["memory"], hard)
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))

    def answer(work):
        signal.setitimer(signal.ITIMER_PROF, setup["seconds"])
        try:
            reply = work()
        except MemoryError:
            reply = {"error": f"needs more than {memory >> 20} MiB"}
        except Exception as error:  # whatever a template provokes is its author's error, to be reported as such
            line = getattr(error, "lineno", None)
            reply = {"error": f"{type(error).__name__}: {str(error)[:500]}" + (f" (line {line})" if line else "")}
        signal.setitimer(signal.ITIMER_PROF, 0)
        sys.stdout.write(json.dumps(reply) + "\n")
        sys.stdout.flush()

    template, env = None, environment()

    def compile_template():
        nonlocal template
        template = env.from_string(setup["template"])
        return {"marks_generation": env.marks_generation}

    answer(compile_template)
    for line in sys.stdin:
        for request in json.loads(line):
            answer(lambda request=request: {
                "text": _render(template, setup["variables"] | request["variables"], request["limit"])})


if __name__ == "__main__":
    main()
