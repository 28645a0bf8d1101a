"""tiktoken's ranks and Hugging Face's tokenizer.json, both ways: the same ids on every text, or an InputError.

Neither format says outright what a `BPETokenizer` has to know. tiktoken joins any two neighbours whose bytes together
are a token, the lowest rank first. Hugging Face tokenizers join the pairs that they list, in that order, and a file
made from ranks lists every way to make a token. But where a token comes up inside a text, no merge has crossed its
ends, so its bytes went through what they go through alone. Hence one merge at most ever makes it; encoding its bytes
finds it.
"""

from __future__ import annotations

import base64
import heapq
import itertools
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import regex

from jaxlm.tokenizers.base import InputError, one_line, shown, write_file
from jaxlm.tokenizers.bpe import BPETokenizer, merged_tokens
from jaxlm.tokenizers.bpe_reference import SPLIT_PATTERNS

# As Radford et al. (2019) published it. tiktoken's form, which is ours, gives the same chunks in less time.
_FIRST_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_SPLIT_OF_TIKTOKEN = {pattern: name for name, pattern in SPLIT_PATTERNS.items()} | {_FIRST_GPT2: "gpt2"}

# Hugging Face's engine is Oniguruma, in Ruby's syntax, where `{1,3}+` repeats a repetition. (That it gives nothing back
# makes no difference to the numbers here. `$` ends a line there; after `\s++` that is the end of the text.)
_HUGGING_FACE_PATTERNS = {name: pattern.replace("{1,3}+", "{1,3}") for name, pattern in SPLIT_PATTERNS.items()}
_SPLIT_OF_HUGGING_FACE = {pattern: name for name, pattern in _HUGGING_FACE_PATTERNS.items()} | {_FIRST_GPT2: "gpt2"}

# The group is what an engine may read otherwise than `regex`, or not at all; the rest passes over escapes and [...].
# That is: sets in sets and operations on them, fuzzy matches, verbs, `$` (for `regex` also before a last newline), and
# any escape or (?...) but those that all read alike; Oniguruma has ways of its own besides.
_ESCAPE = r"\\(?![dDsSwWbBAznrtfvaxupP])[A-Za-z0<>]|\\[pP](?!\{\^?(?!I[ns])\w+\})\{?\w*"
_ITEM = r"(?:\\.|[^\]\\])"
_OTHERWISE = rf"{_ESCAPE}|\[\^?\]?{_ITEM}*?(?:\[|&&|--|~~|{_ESCAPE})|\{{[\d<=,]*[a-z]|\(\*|\$"
_READ_OTHERWISE = {
    engine: re.compile(rf"^\(\?i\)|({_OTHERWISE}|{more})|\\.|\[\^?\]?{_ITEM}*\]", re.DOTALL)
    for engine, more in {
        "tiktoken": r"\(\?(?![:=!>]|P?[<=]|[ims-]+[:)])\w*",
        "Hugging Face tokenizers": r"\(\?(?![:=!><]|-?i:)\w*|\{\d+\}\?|\{[\d,]+\}\+|\^",
    }.items()
}


class Merge(NamedTuple):
    """How a token is made: its place among all merges, the lowest first, and the two tokens that are joined."""

    priority: int
    left: bytes
    right: bytes


Priority = Callable[[bytes, bytes], int]  # of two neighbours
_NEVER = 1 << 62


# ---- tiktoken


def read_tiktoken(
    cls: type[BPETokenizer],
    source: Any,
    split: str | None,
    special_tokens: Sequence[str] | Mapping[str, int] | None,
    pattern: str | None,
) -> BPETokenizer:
    """See `BPETokenizer.from_tiktoken`. Tokens that no merge makes are found as whole chunks alone, as in tiktoken."""
    if hasattr(source, "_mergeable_ranks"):
        if split is None and pattern is None:
            pattern = source._pat_str
        special_tokens = source._special_tokens if special_tokens is None else special_tokens
        source = source._mergeable_ranks
    if isinstance(source, Mapping):
        ranks = _check_ranks(source.items())
    elif isinstance(source, str | os.PathLike):
        ranks = _check_ranks(_read_rank_file(Path(source)))
    else:
        kind = type(source).__name__
        raise InputError(f"Ranks are a mapping, the path of a rank file or a tiktoken.Encoding, not {kind}.")
    if pattern in _SPLIT_OF_TIKTOKEN:
        split, pattern = _SPLIT_OF_TIKTOKEN[pattern], None
    made_by, whole = _find_merges(ranks, lambda left, right: ranks.get(left + right, _NEVER))
    tokenizer = _build(cls, ranks, made_by, whole, split or "gpt4", pattern, special_tokens or ())
    if pattern is not None:
        _check_pattern(pattern, "tiktoken")
    return tokenizer


def _read_rank_file(path: Path) -> Iterable[tuple[bytes, int]]:
    for number, line in enumerate(_read(path).splitlines(), 1):
        if line:
            try:
                token, rank = line.split()
                yield base64.b64decode(token, validate=True), int(rank)
            except ValueError:
                raise InputError(f"Line {number} of {path} isn't a token in base64 and its rank.") from None


def _check_ranks(items: Iterable[tuple[Any, Any]]) -> dict[bytes, int]:
    ranks: dict[bytes, int] = {}
    token_of: dict[int, bytes] = {}
    for token, rank in items:
        if not isinstance(token, bytes) or not hasattr(rank, "__index__"):
            raise InputError(f"Ranks map bytes to integers, and these map {shown(token)} to {shown(rank)}.")
        if not token:
            raise InputError(f"The token of rank {shown(rank)} is empty; each has at least one byte.")
        if rank < 0:
            raise InputError(f"The token {shown(token)} has the rank {shown(rank)}; ranks are at least 0.")
        if token in ranks:
            raise InputError(
                f"The token {shown(token)} is there twice, with the ranks {shown(ranks[token])} and {shown(rank)}."
            )
        if rank in token_of:
            raise InputError(f"The tokens {shown(token_of[rank])} and {shown(token)} both have the rank {shown(rank)}.")
        ranks[token] = int(rank)
        token_of[ranks[token]] = token
    return ranks


def write_tiktoken(tokenizer: BPETokenizer, path: str | os.PathLike[str]) -> None:
    """See `BPETokenizer.to_tiktoken`. Raises InputError where tiktoken would give other ids."""
    lines = [f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in _ranks(tokenizer).items()]
    write_file(Path(path), "".join(lines))


def tiktoken_encoding(tokenizer: BPETokenizer, name: str) -> Any:
    """See `BPETokenizer.to_tiktoken_encoding`. Raises InputError where tiktoken would give other ids.

    Where one special token begins with another, tiktoken may take either; a `BPETokenizer` takes the longer one. A
    pattern of one's own is handed on as it is, to an engine that may class and fold rare characters otherwise.
    """
    try:
        import tiktoken
    except ImportError:
        raise InputError("A tiktoken.Encoding needs the package tiktoken: pip install tiktoken.") from None
    pattern = tokenizer.pattern or SPLIT_PATTERNS[tokenizer.split]
    if pattern not in _SPLIT_OF_TIKTOKEN:
        _check_pattern(pattern, "tiktoken")
    special_tokens = dict(tokenizer.special_tokens)
    ranks = _ranks(tokenizer)
    try:
        return tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=special_tokens)
    except ValueError as error:
        raise InputError(f"tiktoken can't read the pattern {pattern!r}: {' '.join(str(error).split())}.") from None


def _ranks(tokenizer: BPETokenizer) -> dict[bytes, int]:
    """Tokens and ids, in order of id. Raises InputError unless tiktoken makes the same merges of them."""
    ranks = _by_id(_tokens(tokenizer))
    if read_tiktoken(BPETokenizer, ranks, None, (), None).merges != tokenizer.merges:
        raise InputError(
            "tiktoken joins any two neighbours that make a token, in the order of ids, and this vocabulary doesn't; "
            "only one whose ids rise with its merges can be written."
        )
    return ranks


# ---- Hugging Face tokenizers


def read_huggingface(cls: type[BPETokenizer], path: str | os.PathLike[str]) -> BPETokenizer:
    """See `BPETokenizer.from_huggingface`. Added tokens become special tokens.

    What is put around the ids of a text is left out: special tokens by a post-processor, padding, truncation.
    """
    content = _read(Path(path))
    try:
        return _from_json(cls, json.loads(content))
    except InputError as error:
        raise InputError(f"{path} can't be used. {error}") from None
    except (AttributeError, LookupError, OverflowError, RecursionError, TypeError, ValueError):
        raise InputError(f"{path} is no tokenizer.json of Hugging Face tokenizers, or it is damaged.") from None


def _from_json(cls: type[BPETokenizer], data: dict[str, Any]) -> BPETokenizer:
    model = data["model"]
    if model.get("type", "BPE") != "BPE":
        raise InputError(f"Its model is {one_line(str(model['type']), 60)}, and only byte-level BPE can be read.")
    for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(name):
            raise InputError(f"Its model has the {name} {shown(model[name])}, for which a BPETokenizer has no place.")
    if data.get("normalizer") not in (None, {"type": "Sequence", "normalizers": []}):
        raise InputError("It has a normalizer, which changes a text for good, and a BPETokenizer loses nothing.")
    split, pattern = _read_split(data.get("pre_tokenizer") or {"type": None})
    vocabulary = model["vocab"]
    special_tokens = {}
    for added in data.get("added_tokens") or ():
        for flag in ("single_word", "lstrip", "rstrip"):
            if added.get(flag):
                raise InputError(
                    f"Its added token {shown(added['content'])} has {flag}, which a special token can't have."
                )
        special_tokens[added["content"]] = vocabulary.get(added["content"], added["id"])

    ordinary = {name: token for name in vocabulary if name not in special_tokens and (token := _spelt(name))}
    tokens = {token: vocabulary[name] for name, token in ordinary.items()}
    order: dict[tuple[bytes, bytes], int] = {}
    for index, pair in enumerate(model["merges"]):
        left, right = pair.split(" ") if isinstance(pair, str) else pair
        for name in (left, right, left + right):
            if name not in ordinary:
                raise InputError(
                    f"Its merge of {shown(left)} and {shown(right)} needs {shown(name)}, which is no ordinary token."
                )
        order[ordinary[left], ordinary[right]] = index
    made_by = {left + right: Merge(index, left, right) for (left, right), index in order.items()}
    whole: list[bytes] = []
    parts = {part for merge in made_by.values() for part in merge[1:] if len(part) > 1}
    if model.get("ignore_merges") or len(made_by) < len(order) or parts - made_by.keys():
        made_by, whole = _find_merges(tokens, lambda left, right: order.get((left, right), _NEVER))
    if not model.get("ignore_merges"):
        # Tokens that no merge makes are never produced, and leave gaps. They can't change the ids of any text; refusing
        # them would keep sound vocabularies out, for what no model has ever been trained on.
        whole = []
    return _build(cls, tokens, made_by, whole, split, pattern, special_tokens)


def _read_split(pre_tokenizer: dict[str, Any]) -> tuple[str, str | None]:
    """The split and the pattern that do what a pre-tokenizer does."""
    steps = pre_tokenizer["pretokenizers"] if pre_tokenizer["type"] == "Sequence" else [pre_tokenizer]
    kinds = [step["type"] for step in steps]
    if kinds not in (["ByteLevel"], ["Split", "ByteLevel"]):
        raise InputError("Its pre-tokenizer isn't ByteLevel, alone or after one Split; no other can be read.")
    if steps[-1].get("add_prefix_space", True):
        raise InputError("Its pre-tokenizer adds a space before a text, and a BPETokenizer changes nothing.")
    uses_regex = steps[-1].get("use_regex", True)
    if kinds == ["ByteLevel"]:
        return "gpt2" if uses_regex else "none", None
    ((kind, pattern),) = steps[0]["pattern"].items()
    behavior = steps[0]["behavior"], steps[0]["invert"]
    if uses_regex or behavior not in (("Isolated", False), ("Isolated", True), ("Removed", True)):
        raise InputError("Its pre-tokenizer doesn't just cut a text into the matches of one pattern.")
    if kind == "String":
        literal = re.escape(pattern)  # what lies between two places where it stands is a chunk as well
        return "gpt4", rf"{literal}|(?:(?!{literal})[\s\S])+" if behavior[0] == "Isolated" else literal
    if pattern in _SPLIT_OF_HUGGING_FACE:
        return _SPLIT_OF_HUGGING_FACE[pattern], None
    _check_pattern(pattern, "Hugging Face tokenizers")
    return "gpt4", pattern


def write_huggingface(tokenizer: BPETokenizer, path: str | os.PathLike[str]) -> None:
    """See `BPETokenizer.to_huggingface`. Raises InputError where Hugging Face tokenizers would give other ids.

    A pattern of one's own is written as it is, for Oniguruma, which may class and fold rare characters otherwise.
    """
    if tokenizer.pattern:
        _check_pattern(tokenizer.pattern, "Hugging Face tokenizers")
    pattern = tokenizer.pattern or _HUGGING_FACE_PATTERNS[tokenizer.split]
    symbols = merged_tokens(tokenizer.merges)
    pairs = [(symbols[left], symbols[right]) for left, right in tokenizer.merges]
    tokens = _tokens(tokenizer)
    if tokenizer.whole:  # then a chunk that is a token is that token there, also if its merge is never made
        order = {pair: index for index, pair in enumerate(pairs)}
        _, never_made = _find_merges(tokens, lambda left, right: order.get((left, right), _NEVER))
        if rest := set(never_made) - set(tokenizer.whole):
            raise InputError(f"Hugging Face tokenizers would make the token {min(rest)!r}, which is never made here.")
    vocabulary = {_spelling(token): token_id for token, token_id in tokens.items()}
    for name, token_id in tokenizer.special_tokens.items():
        # An added token keeps any id if it stands in the vocabulary, but what stands there is also read as a spelling.
        if name in vocabulary or (tokenizer.whole and _spells_another_text(name)):
            raise InputError(f"The special token {name!r} is spelt there as ordinary text is; give it another name.")
        vocabulary[name] = token_id
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    cut = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    steps = [byte_level] if pattern == SPLIT_PATTERNS["none"] else [cut, byte_level]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    added_tokens = [{"id": token_id, "content": name, **flags} for name, token_id in tokenizer.special_tokens.items()]
    model = {
        "type": "BPE",
        "ignore_merges": bool(tokenizer.whole),
        "vocab": _by_id(vocabulary),
        "merges": [f"{_spelling(left)} {_spelling(right)}" for left, right in pairs],
    }
    data = {
        "version": "1.0",
        "added_tokens": added_tokens,
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps},
        "post_processor": None,
        "decoder": byte_level,
        "model": model,
    }
    write_file(Path(path), json.dumps(data, ensure_ascii=False, indent=1) + "\n")


def _byte_characters() -> list[str]:
    """The character that stands for each byte in the spelling of tokens (the table of GPT-2, Radford et al. 2019).

    A byte that is a visible character of Latin-1 is that character; the 68 others are, in order, U+0100 and following.
    """
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = itertools.count(0x100)
    return [chr(byte if byte in visible else next(others)) for byte in range(256)]


_CHARACTERS = _byte_characters()
_BYTES = {character: byte for byte, character in enumerate(_CHARACTERS)}


def _spelling(token: bytes) -> str:
    return "".join([_CHARACTERS[byte] for byte in token])


def _spelt(spelling: str) -> bytes | None:
    """The bytes that are spelt so, or None if none are."""
    try:
        return bytes([_BYTES[character] for character in spelling])
    except KeyError:
        return None


def _spells_another_text(name: str) -> bool:
    try:
        return (_spelt(name) or name.encode()).decode() != name
    except UnicodeDecodeError:  # bytes that are no text
        return False


# ---- patterns


def _check_pattern(pattern: str, reader: str) -> None:
    """Raises InputError for a pattern with which the engine of another library may cut a text in other places."""
    for match in _READ_OTHERWISE[reader].finditer(pattern):
        if match.group(1):
            part = shown(match.group(1))
            raise InputError(
                f"The pattern {shown(pattern)} has {part} in it, which the engine of {reader} may read "
                "in another way than `regex` does, or not at all; say it differently."
            )
    if reader == "tiktoken" and regex.match(pattern, ""):
        raise InputError(
            f"The pattern {shown(pattern)} can match nothing, where tiktoken fails or loses text; avoid that."
        )


# ---- merges


def _last_merge(token: bytes, priority: Priority) -> Merge | None:
    """The merge that makes a token of two bytes or more when its bytes are encoded alone, or None if none does."""
    ends = list(range(1, len(token) + 1))  # of the part that begins at each place; 0 where none does any more
    befores = list(range(-1, len(token) - 1))  # where the part before begins
    heap: list[tuple[int, int, int, int]] = []

    def enter(start: int) -> None:
        """The part that begins there, and the next one, as a pair to be merged."""
        middle = ends[start]
        if middle < len(token):
            found = priority(token[start:middle], token[middle : ends[middle]])
            if found != _NEVER:
                heapq.heappush(heap, (found, start, middle, ends[middle]))

    for place in range(len(token)):
        enter(place)
    while heap:
        best, start, middle, end = heapq.heappop(heap)
        if ends[start] != middle or ends[middle] != end:
            continue  # one of the two was merged with another
        if end - start == len(token):
            return Merge(best, token[:middle], token[middle:])
        ends[start], ends[middle] = end, 0
        if end < len(token):
            befores[end] = start
        enter(start)
        if start:
            enter(befores[start])
    return None


def _find_merges(tokens: Iterable[bytes], priority: Priority) -> tuple[dict[bytes, Merge], list[bytes]]:
    """The merge that makes each token, and the tokens that none makes."""
    found = {token: _last_merge(token, priority) for token in tokens if len(token) > 1}
    return {token: merge for token, merge in found.items() if merge}, [token for token in found if not found[token]]


def _in_order(made_by: Mapping[bytes, Merge]) -> list[bytes]:
    """The tokens, each after its parts, in an order of merging that gives the same ids.

    Nearly always that is the order of priorities. But a token may come before one of its parts, as some of Llama 3's
    do. Such an early token is made at once where the part has been made, before the part is made elsewhere; in the
    order given here, the part is made everywhere first. The ids are the same unless what happens at one place reaches
    the next: an early token joins both, or takes a neighbour that the next one could take, or one that it is made of.

    Raises:
      InputError: it could reach it.
    """
    # What tokens are sorted by: their priority. An early one has the key of its later part and then its own priority,
    # so that it stands right after that part, before all that is merged later. Its first number is what it waited for.
    keys: dict[bytes, tuple[int, ...]] = {bytes([byte]): () for byte in range(256)}
    first_part = {merge.priority: merge.left for merge in made_by.values()}
    taken: dict[int, tuple[set[bytes], set[bytes]]] = {}  # around a place: before the next one, and after this one
    for token in sorted(made_by, key=len):
        priority, left, right = made_by[token]
        latest = max(keys[left], keys[right])
        keys[token] = (priority,) if (priority,) > latest else (*latest, priority)
        if keys[token] == (priority,):
            continue
        waited_for = keys[token][:1]
        before, after = taken.setdefault(waited_for[0], ({first_part[waited_for[0]]}, set()))
        if keys[left][:1] == waited_for:  # it grew out of that part, or is it
            after.add(right)
        if keys[right][:1] == waited_for:
            before.add(left)
        if keys[left][:1] == keys[right][:1] or before & after:
            raise InputError(
                f"The token {shown(token)} is merged before its parts are, in a way that merges here can't be."
            )
    return sorted(made_by, key=keys.__getitem__)


def _build(
    cls: type[BPETokenizer],
    tokens: Mapping[bytes, int],
    made_by: Mapping[bytes, Merge],
    whole: Iterable[bytes],
    split: str,
    pattern: str | None,
    special_tokens: Sequence[str] | Mapping[str, int],
) -> BPETokenizer:
    order = [bytes([byte]) for byte in range(256)]
    for byte in order:
        if byte not in tokens:
            raise InputError(f"The byte {byte!r} has no id, and a byte-level vocabulary has all 256 bytes.")
    order += _in_order(made_by)
    symbol_of = {token: symbol for symbol, token in enumerate(order)}
    return cls(
        [(symbol_of[made_by[token].left], symbol_of[made_by[token].right]) for token in order[256:]],
        split=split,
        special_tokens=special_tokens,
        pattern=pattern,
        ids=[tokens[token] for token in order],
        whole={token: tokens[token] for token in whole},
    )


def _tokens(tokenizer: BPETokenizer) -> dict[bytes, int]:
    """The id of each ordinary token. Raises InputError if two have the same bytes."""
    tokens: dict[bytes, int] = {}
    ordinary = [*merged_tokens(tokenizer.merges), *tokenizer.whole]
    for token, token_id in zip(ordinary, [*tokenizer.ids, *tokenizer.whole.values()], strict=True):
        if tokens.setdefault(token, token_id) != token_id:
            raise InputError(
                f"The ids {tokens[token]} and {token_id} both stand for {shown(token)}; only one can be written."
            )
    return tokens


# ---- files


def _by_id(ids: Mapping[Any, int]) -> dict[Any, int]:
    return dict(sorted(ids.items(), key=lambda item: item[1]))


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{path} can't be read: {error.strerror}.") from None
