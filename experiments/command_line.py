"""What the experiments share at the command line: typed flags with presets, and how a program ends.

Exit status: 0 done; 1 the run failed; 2 bad input, said in one sentence; 130 interrupted after saving.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn, TypeVar

import jax
import tyro
from rich.console import Console

from jaxlm.data.cache import cache_directory
from jaxlm.runs import RunFailed, RunInterrupted
from jaxlm.tokenizers.base import InputError, one_line, shown

Config = TypeVar("Config")
MOST_SEEDS = 1_000
_UNUSABLE = (
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ELOOP,
)  # fmt: skip
_MARKERS = (tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff)
_errors = Console(stderr=True, highlight=False, soft_wrap=True)


def program(module: str, presets: Mapping[str, Config], main: Callable[[Config], None]) -> NoReturn:
    """Parses the flags of `python -m module`, runs `main` and exits with the status that says how it went."""
    arguments = sys.argv[1:]
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a path may hold what the terminal's encoding can't
            stream.reconfigure(errors="backslashreplace")
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:  # a second start finds its programs compiled
        jax.config.update("jax_compilation_cache_dir", str(cache_directory() / "xla"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)  # a start runs some hundred small ones
    command = shlex.join(["python", "-m", module, *arguments])
    try:
        main(parse(arguments, presets, f"python -m {module}"))
    except InputError as error:
        _end(2, str(error))
    except RunInterrupted as error:
        _end(130, f"{error} Continue with: {command}")
    except KeyboardInterrupt:
        _end(130, f"Interrupted; what was saved before is kept. Start again with: {command}")
    except RunFailed as error:
        _end(1, str(error))
    except BrokenPipeError:
        # The reader has gone, as after `| head`; Python would complain once more while flushing.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            _end(1, f"Writing failed: {error.strerror} ({error.filename}); make room and run the same command again.")
        if error.errno in _UNUSABLE:
            _end(2, f"{error.filename} can't be used: {error.strerror}; check its permissions or choose another path.")
        raise
    sys.exit(0)


def parse(arguments: Sequence[str], presets: Mapping[str, Config], name: str) -> Config:
    """The preset that `--preset` names (the first if none does), overridden by the other flags.

    Raises:
      InputError: an unknown flag or preset, or a value that doesn't fit, in one sentence.
    """
    preset = next(iter(presets))
    for index, argument in enumerate(arguments):
        if argument == "--preset" and index + 1 < len(arguments):
            preset = arguments[index + 1]
        elif argument.startswith("--preset="):
            preset = argument.removeprefix("--preset=")
    if preset not in presets:
        raise InputError(f"There is no preset {shown(preset)}; there are {', '.join(presets)}.")
    default: Any = presets[preset]
    boxed = io.StringIO()
    try:
        with contextlib.redirect_stderr(boxed):
            return tyro.cli(type(default), prog=name, args=list(arguments), default=default, config=_MARKERS)
    except SystemExit as error:
        if not error.code:
            raise
        cause: BaseException | None = error
        while cause is not None:
            if isinstance(cause, InputError):  # of a setting that checks itself; in a box its sentence may be cut
                raise cause from None
            cause = cause.__cause__ or cause.__context__
        raise InputError(f"{_unboxed(boxed.getvalue())}; see {name} --help.") from None


def check_seeds(seeds: int) -> None:
    """Raises InputError unless so many seeds can be tried."""
    if not 1 <= seeds <= MOST_SEEDS:
        raise InputError(f"The number of seeds is from 1 to {MOST_SEEDS}, not {seeds}.")


def _unboxed(box: str) -> str:
    """The first paragraph below the title of one of tyro's boxes, which may be drawn in ASCII, as one line."""
    lines: list[str] = []
    for line in box.splitlines()[1:]:
        text = line.strip("│ ")
        if set(text) <= set("─╰╯-"):
            if lines:
                break
            continue
        lines.append(text)
    return one_line(" ".join(lines).rstrip("."), 300)


def _end(status: int, message: str) -> NoReturn:
    _errors.print(message, style="red" if status in (1, 2) else "yellow", markup=False)
    sys.exit(status)
