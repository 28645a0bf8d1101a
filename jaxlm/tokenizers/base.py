"""The protocol that every tokenizer follows: lossless text <-> ids, with one treatment of special tokens.

A tokenizer maps any `str` without lone surrogates to ids and back. What a subclass has to bring is how ordinary text
is encoded and which bytes an id stands for; special tokens, checks and the content hash are the same for all.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import itertools
import json
import os
import re
import reprlib
import threading
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Collection, Container, Iterable, Iterator, Mapping, Sequence
from functools import cache, cached_property
from numbers import Integral, Real
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar, get_args, get_origin, get_type_hints

import numpy as np
import numpy.typing as npt

IdArray = npt.NDArray[np.int32]
AllowedSpecial = Literal["all", "none"] | Collection[str]
_Item = TypeVar("_Item")

END_OF_TEXT = "<|endoftext|>"
TOKENIZER_FILE = "tokenizer.json"
_VISIBLE = str.maketrans({"\n": "⏎", "\t": "→", " ": "·", "\r": "␍"})


class InputError(ValueError):
    """Bad input. The message is one sentence for the person who gave it: what is wrong, and what to do."""


def shown(value: Any, length: int = 60) -> str:
    """A value as it can stand in a sentence: its `repr`, shortened if it is long or deep."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = length
    return short.repr(value)


def one_line(text: str, length: int = 200) -> str:
    """What another library says, as it can stand in a sentence: printable, and cut if it is long."""
    text = "".join(character if character.isprintable() else ascii(character)[1:-1] for character in text[: length + 1])
    return text if len(text) <= length else f"{text[:length]}..."


def check_types(config: Any) -> None:
    """Raises InputError for a field of a dataclass whose value isn't of its type, or is beyond 64 bits."""
    for name, kinds in _field_kinds(config.__class__).items():
        value = getattr(config, name)
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            names = {Integral: "a whole number", Real: "a number", bool: "true or false", str: "a text"}
            wanted = " or ".join(names.get(kind, "nothing" if kind is type(None) else kind.__name__) for kind in kinds)
            raise InputError(f"{name} is {wanted}, not {shown(value)}.")
        if isinstance(value, Integral) and not -(2**63) <= int(value) < 2**63:
            raise InputError(f"{name} is a number below 2^63, not {shown(value)}.")
    for name, choices in _field_choices(config.__class__).items():
        value = getattr(config, name)
        if isinstance(value, str) and value not in choices:
            raise InputError(f"{name} is one of {', '.join(choices)}, not {shown(value)}.")


@cache
def _field_choices(cls: type) -> dict[str, tuple[str, ...]]:
    """The values that each field of a dataclass can have whose type is a Literal, or one or nothing."""
    return {
        name: get_args(part)
        for name, hint in get_type_hints(cls).items()
        for part in (hint, *get_args(hint))
        if get_origin(part) is Literal
    }


@cache
def _field_kinds(cls: type) -> dict[str, tuple[type, ...]]:
    """What the value of each field of a dataclass can be an instance of."""
    kinds: dict[Any, type] = {int: Integral, float: Real}

    def of(hint: Any) -> Iterator[type]:
        if get_origin(hint) is Literal:
            yield from map(type, get_args(hint))
        elif get_args(hint):
            for part in get_args(hint):
                yield from of(part)
        else:
            yield kinds.get(hint, hint)

    return {name: tuple(dict.fromkeys(of(hint))) for name, hint in get_type_hints(cls).items()}


class Tokenizer(ABC):
    """Lossless text <-> ids.

    Attributes:
      kind: the name under which `load_tokenizer` finds the class again.
      special_tokens: name -> id. They stand for no source bytes.
      end_of_text_id: the id that closes a document, or None for an imported vocabulary without one.
    """

    kind: ClassVar[str]
    format_version: ClassVar[int] = 1
    special_tokens: dict[str, int]

    # ---- what each kind of tokenizer brings

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """The highest id + 1, special tokens included."""

    @abstractmethod
    def _encode_ordinary(self, text: str) -> IdArray:
        """Ids of `text` in which no special token has a meaning."""

    @abstractmethod
    def token_bytes(self, token_id: int) -> bytes:
        """The UTF-8 bytes that one id shows as; the name of a special token; empty for an escape marker."""

    @abstractmethod
    def decode_bytes(self, ids: Iterable[int] | npt.NDArray[np.integer]) -> bytes:
        """The bytes of a sequence of ids, special tokens as their names. Raises InputError for an id out of range."""

    @abstractmethod
    def byte_lengths(self, ids: Iterable[int] | npt.NDArray[np.integer]) -> IdArray:
        """Source bytes of each position, int32, shape of `ids`; 0 for special tokens.

        For `ids = encode(text)` without special tokens they sum to `len(text.encode())`.
        """

    @abstractmethod
    def _content(self) -> dict[str, Any]:
        """All that determines the function from text to ids, as JSON-able data."""

    @classmethod
    @abstractmethod
    def _from_content(cls, content: dict[str, Any]) -> Tokenizer:
        """The inverse of `_content`."""

    # ---- what is the same for all

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.vocab_size} ids)"

    @property
    def end_of_text_id(self) -> int | None:
        return self.special_tokens.get(END_OF_TEXT)

    @property
    def hash(self) -> str:
        """SHA-256 of the content: equal hashes mean the same ids for every text."""
        return content_hash({"kind": self.kind, **self._content()})

    def encode(self, text: str, *, allowed_special: AllowedSpecial = ()) -> IdArray:
        """Ids of `text`: a 1-D int32 array.

        A special token in the text is an error unless it is named in `allowed_special`; "all" gives each its id, and
        "none" encodes them all as the plain text that they also are. Where several match, the longest is taken, even
        if a shorter one inside it isn't allowed; tiktoken refuses that.

        Raises:
          InputError: a lone surrogate, a special token that isn't allowed, or something that is no `str`.
        """
        check_text(text)
        check_allowed_special(allowed_special)
        arrays = []
        for piece, token_id in self._cut(text, allowed_special):
            arrays.append(self._encode_ordinary(piece))
            if token_id >= 0:
                arrays.append(np.array([token_id], np.int32))
        return np.concatenate(arrays) if len(arrays) > 1 else arrays[0]

    def _cut(self, text: str, allowed_special: AllowedSpecial) -> Iterator[tuple[str, int]]:
        """The pieces of a text between special tokens, each with the id of the one after it, or -1 at the end."""
        start = 0
        if allowed_special != "none" and self._may_hold_special([text]):
            check_text(text)  # before it is in pieces, whose characters are numbered otherwise
            for match in self._special_pattern.finditer(text):
                name = match.group()
                if allowed_special != "all" and name not in allowed_special:
                    raise InputError(
                        f"The text contains the special token {shown(name)}; pass allowed_special={{{shown(name)}}} to "
                        'encode it as that token, or allowed_special="none" to encode it as plain text.'
                    )
                yield text[start : match.start()], self.special_tokens[name]
                start = match.end()
        yield text[start:], -1

    def _may_hold_special(self, texts: Iterable[str]) -> bool:
        """A quick look: False for nearly all texts without special tokens, as they lack the beginnings of any."""
        return any(beginning in text for text in texts for beginning in self._special_beginnings)

    @cached_property
    def _special_beginnings(self) -> list[str]:
        """What all special tokens of the same first character begin with; [""] if there are ten such characters."""
        groups = itertools.groupby(sorted(self.special_tokens), key=lambda name: name[0])
        beginnings = [os.path.commonprefix(list(names)) for _, names in groups]  # noqa: RUF071 (of any strings)
        return beginnings if len(beginnings) < 10 else [""]

    @cached_property
    def _special_pattern(self) -> re.Pattern[str]:
        return longest_first(self.special_tokens)

    def decode(self, ids: Iterable[int] | npt.NDArray[np.integer]) -> str:
        """Text of a sequence of ids; invalid UTF-8 shows as U+FFFD, special tokens show as their names."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def encode_batch(
        self, texts: Iterable[str], *, allowed_special: AllowedSpecial = (), flat: bool = False
    ) -> list[IdArray] | tuple[IdArray, npt.NDArray[np.int64]]:
        """`encode` for each of many texts: a list of arrays.

        With `flat`, the ids of all texts in one array, and int64 offsets of shape (len(texts) + 1,): text i has
        `ids[offsets[i] : offsets[i + 1]]`.
        """
        texts = list_of_texts(texts)
        arrays = [self.encode(text, allowed_special=allowed_special) for text in texts]
        if not flat:
            return arrays
        return np.concatenate([np.zeros(0, np.int32), *arrays]), np.cumsum([0, *map(len, arrays)], dtype=np.int64)

    def decode_batch(self, batch: Iterable[Iterable[int] | npt.NDArray[np.integer]]) -> list[str]:
        """`decode` for each of many sequences of ids."""
        return [self.decode(ids) for ids in each_of(batch, "sequences of ids")]

    def decode_iter(self, ids: Iterable[int]) -> Iterator[str]:
        """The text of ids as they come, piece by piece. A piece is given out when it can no longer change.

        So a character whose last bytes, or whose closing escape, are still to come is held back.
        """
        given = ""
        seen: list[int] = []
        for token_id in each_of(ids, "ids"):
            seen.append(token_id)
            # What is still to be completed shows as U+FFFD, what may open an escape of SentencePiece's as U+2582.
            text = self.decode(seen)
            settled = text.rstrip("\ufffd\u2582")
            if len(settled) > len(given):
                yield settled[len(given) :]
                given = settled
            if settled == text:  # nothing is held back, so that what follows is decoded alone
                seen, given = [], ""
        if rest := self.decode(seen)[len(given) :]:
            yield rest

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Writes `tokenizer.json` into `directory`. Raises InputError for a place that can't be written."""
        content = {"kind": self.kind, **self._content()}
        text = json.dumps(
            {"version": self.format_version, "hash": content_hash(content), **content}, ensure_ascii=False, indent=1
        )
        write_file(Path(directory) / TOKENIZER_FILE, text + "\n")

    def _check_ids(self, ids: Iterable[int] | npt.NDArray[np.integer]) -> npt.NDArray[np.int64]:
        try:
            array = np.asarray(ids if isinstance(ids, np.ndarray | Sequence) else list(ids))
        except (TypeError, ValueError, OverflowError):
            raise InputError("Ids are a 1-D sequence of integers.") from None
        if array.shape == (0,):
            return np.zeros(0, np.int64)
        # Integers of more than 64 bits are objects.
        are_integers = array.dtype.kind in "iu" or all(isinstance(item, Integral) for item in array.flat)
        if array.ndim != 1 or not are_integers:
            raise InputError(f"Ids are a 1-D sequence of integers, not {array.dtype} of shape {array.shape}.")
        if array.min() < 0 or array.max() >= self.vocab_size:
            worst = int(array.min() if array.min() < 0 else array.max())
            raise InputError(f"The id {shown(worst)} is outside the vocabulary of {self.vocab_size} ids.")
        return array.astype(np.int64, copy=False)


def visible(token: bytes) -> str:
    """One token as it can be shown on a line; an escape marker, which stands for no byte, as `◇`."""
    return token.decode("utf-8", errors="backslashreplace").translate(_VISIBLE) if token else "◇"


def longest_first(names: Iterable[str]) -> re.Pattern[str]:
    """A pattern that matches any of `names`, the longest where one is the beginning of another."""
    return re.compile("|".join(re.escape(name) for name in sorted(names, key=len, reverse=True)))


def check_text(text: str, begin: int = 0) -> None:
    """Raises InputError unless `text`, or this part of one from a character on, is a `str` that UTF-8 can hold."""
    if not isinstance(text, str):
        raise InputError(f"A tokenizer encodes str, not {type(text).__name__}; decode bytes first.")
    try:
        text.encode("utf-16-le")  # refuses the same characters as UTF-8, five times as fast
    except UnicodeEncodeError as error:
        raise _surrogate(text, error, begin) from None


def encode_utf8(text: str, begin: int = 0) -> bytes:
    """The UTF-8 of a text, or of the part of one that begins at a character. Raises InputError as `check_text` does."""
    if not isinstance(text, str):
        check_text(text)
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise _surrogate(text, error, begin) from None


def _surrogate(text: str, error: UnicodeEncodeError, begin: int) -> InputError:
    return InputError(
        f"The text holds the lone surrogate U+{ord(text[error.start]):04X} at character {begin + error.start}, which "
        "no UTF-8 text can; remove it, or read the source with errors='replace'."
    )


def each_of(items: Iterable[_Item], what: str) -> Iterator[_Item]:
    """An iterable's items. Raises InputError, which says what is needed, for what holds none."""
    try:
        return iter(items)
    except TypeError:
        raise InputError(f"An iterable of {what} is needed, not {type(items).__name__}.") from None


def each_text(texts: Iterable[str]) -> Iterator[str]:
    """Texts, one by one. Raises InputError for a bare `str`, whose items are characters, and what holds no items."""
    if not isinstance(texts, str | bytes):
        with contextlib.suppress(TypeError):
            return iter(texts)
    raise InputError(f"An iterable of texts is needed, not {type(texts).__name__}; put a single text into a list.")


def check_texts(texts: Iterable[str]) -> Iterator[str]:
    """The texts of a training corpus, each checked."""
    for text in each_text(texts):
        check_text(text)
        yield text


def blocks_of(texts: Iterable[str], size: int) -> Iterator[list[str]]:
    """Texts together, as many as have `size` characters."""
    block: list[str] = []
    characters = 0
    for text in texts:
        block.append(text)
        characters += len(text) + 1  # empty ones count, too
        if characters >= size:
            yield block
            block, characters = [], 0
    if block:
        yield block


def check_allowed_special(allowed_special: AllowedSpecial) -> None:
    """Raises InputError for what is neither "all" nor "none" nor a collection of names."""
    words = ("all", "none")
    if not (allowed_special in words if isinstance(allowed_special, str) else isinstance(allowed_special, Collection)):
        raise InputError(f'allowed_special is "all", "none" or a set of names, not {allowed_special!r}.')


def list_of_texts(texts: Iterable[str]) -> list[str]:
    """The texts of a batch. Raises InputError as `each_text` does, and for what is no `str`."""
    texts = list(each_text(texts))
    if not set(map(type, texts)) <= {str}:
        for text in texts:
            check_text(text)
    return texts


def special_token_ids(
    names: Sequence[str] | Mapping[str, int], first_id: int, taken: Container[int] | None = None
) -> dict[str, int]:
    """Special tokens as a mapping name -> id: those of a mapping as they are, those of a sequence from `first_id` on.

    Raises:
      InputError: an empty name, a name or an id twice, a negative id, or one in `taken` (None: all below `first_id`);
        a bare `str`, a set, whose names have no order, or what holds no names at all.
    """
    taken = range(first_id) if taken is None else taken
    if isinstance(names, str | bytes | set | frozenset) or not isinstance(names, Iterable):
        raise InputError(
            f"special_tokens is a mapping to ids or a sequence of names, such as ({END_OF_TEXT!r},), not "
            f"{shown(names)}."
        )
    pairs = list(names.items()) if isinstance(names, Mapping) else [(n, first_id + i) for i, n in enumerate(names)]
    for name, token_id in pairs:
        if not isinstance(name, str):
            raise InputError(f"The name of a special token is a str, not {shown(name)}.")
        check_text(name)
        if not isinstance(token_id, Integral):
            raise InputError(f"The special token {shown(name)} has the id {shown(token_id)}; an id is a whole number.")
        if not name:
            raise InputError("A special token is empty; give it at least one character.")
        if token_id < 0:
            raise InputError(f"The special token {shown(name)} has the id {shown(token_id)}; ids are at least 0.")
        if token_id in taken:
            raise InputError(
                f"The special token {shown(name)} has the id {token_id}, which an ordinary token has already."
            )
    for what, values in (("name", [name for name, _ in pairs]), ("id", [token_id for _, token_id in pairs])):
        twice = [value for value, count in Counter(values).items() if count > 1]
        if twice:
            raise InputError(f"The special-token {what} {shown(twice[0])} is given twice; each needs its own.")
    return {name: int(token_id) for name, token_id in pairs}


def content_hash(content: Any) -> str:
    """SHA-256 (hexadecimal) of JSON-able data, independent of the order of keys."""
    canonical = json.dumps(content, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def write_file(path: Path, text: str) -> None:
    """Writes a file, under a temporary name first, and the folders above it.

    Raises:
      InputError: it can't be written there. A full disk is no fault of the place, and stays an OSError.
    """
    try:
        with replacing(path) as temporary:
            temporary.write_text(text, encoding="utf-8", newline="\n")
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise InputError(f"{path} can't be written: {error.strerror}; choose another place.") from None


def save_array(path: Path, array: npt.NDArray[Any]) -> None:
    """Writes an array as a .npy file, whole or not at all."""
    with replacing(path) as temporary:
        try:
            np.save(temporary, array, allow_pickle=False)
        except OSError as error:  # a full disk is told by numpy as the bytes that it didn't write
            raise OSError(error.errno or errno.ENOSPC, error.strerror or os.strerror(errno.ENOSPC), str(path)) from None


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path, of the same suffix, that takes the place of `path` when the block ends well.

    The folders above it are made. So a file is there whole or not at all.
    """
    temporary = path.parent / f".{path.stem}.{os.getpid()}-{threading.get_ident()}.tmp{path.suffix}"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        temporary.replace(path)
    except OSError as error:
        if error.errno is not None:
            error.filename = error.filename or str(path)
        raise
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def load_tokenizer(directory: str | os.PathLike[str]) -> Tokenizer:
    """The tokenizer that `save` wrote into `directory`, of whichever kind it is.

    Raises:
      InputError: no tokenizer there, a newer format, an unknown kind, or content that doesn't match its hash.
    """
    from jaxlm.tokenizers import TOKENIZER_KINDS

    if not isinstance(directory, str | os.PathLike):
        raise InputError(f"A tokenizer is loaded from the directory that `save` wrote, not from {directory!r}.")
    path = Path(directory) / TOKENIZER_FILE
    damaged = InputError(f"{path} is no tokenizer file, or it is damaged; save the tokenizer again.")
    try:
        data = json.loads(path.read_bytes())
        found_hash = content_hash({key: value for key, value in data.items() if key not in ("version", "hash")})
        version, stored_hash, kind = data.pop("version"), data.pop("hash"), data.pop("kind")
    except NotADirectoryError:
        raise InputError(f"{directory} is no directory; give the directory that `save` wrote.") from None
    except (FileNotFoundError, IsADirectoryError):
        raise InputError(f"There is no tokenizer at {path}; give the directory that `save` wrote.") from None
    except OSError as error:
        raise InputError(f"{path} can't be read: {error.strerror}; check its permissions.") from None
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
        raise damaged from None
    if not isinstance(kind, str) or kind not in TOKENIZER_KINDS:
        raise InputError(
            f"{path} is of the unknown kind {shown(kind)}; known are {', '.join(sorted(TOKENIZER_KINDS))}."
        )
    known = TOKENIZER_KINDS[kind].format_version
    if type(version) is not int or version != known:
        advice = "train the tokenizer again" if isinstance(version, int) and version < known else "use a newer jaxlm"
        raise InputError(f"{path} has format version {shown(version)}; this jaxlm reads version {known}, so {advice}.")
    if found_hash != stored_hash:
        raise InputError(f"{path} doesn't match its hash: it was changed or damaged; save the tokenizer again.")
    try:
        return TOKENIZER_KINDS[kind]._from_content(data)
    except InputError as error:
        raise InputError(f"{path} can't be used. {error}") from None
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError, RecursionError):
        raise damaged from None
