"""mxrun against the Python runtime and the tokenizers library: the same results and refusals."""

import hashlib
import json
import os
import random
import re
import shutil
import subprocess
import sys
import unicodedata
from collections.abc import Callable
from pathlib import Path
from pydoc_data import topics
from typing import Any

import numpy as np
import pytest
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from mxcompile import artifact, cli, runtime, weights
from mxcompile.errors import MxError
from tests import conftest, toy

ROOT = Path(__file__).parent.parent
Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session")
def run(mxrun: Path) -> Run:
    """Runs mxrun with words; gives what it wrote."""

    def call(*words: object, text: str = "") -> subprocess.CompletedProcess[str]:
        command = [str(mxrun), *map(str, words)]
        return subprocess.run(command, input=text, capture_output=True, text=True, check=False)

    return call


def letters() -> Tokenizer:
    """A byte-level tokenizer of as many tokens as the toy knows."""
    alphabet = [*(chr(c) for c in range(ord("a"), ord("w"))), "Ġ"]
    pairs = [
        ("a", "b"),
        ("ab", "c"),
        ("Ġ", "a"),
        ("d", "e"),
        ("Ġa", "b"),
        *zip("fhjlnprt", "gikmoqsu", strict=True),
    ]
    merged = [left + right for left, right in pairs]
    words = [*toy.WORDS[: toy.EOS + 1], *alphabet, *merged]
    found = Tokenizer(models.BPE({w: n for n, w in enumerate(words)}, pairs))
    assert found.get_vocab_size() <= toy.VOCABULARY
    found.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    found.decoder = decoders.ByteLevel()
    found.add_special_tokens([*toy.WORDS[: toy.EOS + 1]])
    found.post_processor = processors.TemplateProcessing(
        single=f"{toy.WORDS[toy.BOS]} $A", special_tokens=[(toy.WORDS[toy.BOS], toy.BOS)]
    )
    return found


def seal(folder: Path) -> None:
    """Make a changed artifact whole again."""
    data = json.loads((folder / artifact.MANIFEST).read_bytes())
    for name in data["files"]:
        record = artifact._record(folder / name)
        data["files"][name] = {"sha256": record.sha256, "bytes": record.bytes}
    del data["digest"]
    data["digest"] = artifact._digest(data)
    (folder / artifact.MANIFEST).write_text(json.dumps(data))


@pytest.fixture(scope="session")
def spoken(compiled: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toy with a tokenizer that mxrun reads."""
    folder = Path(
        shutil.copytree(compiled / "toy.mxc", tmp_path_factory.mktemp("spoken") / "toy.mxc")
    )
    letters().save(str(folder / "tokenizer.json"))
    seal(folder)
    return folder


# Programs


@pytest.mark.parametrize(
    "words",
    [
        ["-n", "40"],
        ["-n", "600", "-t", "1", "--ignore-eos"],  # the caches grow
        ["-n", "50", "--temperature", "40", "--seed", "3", "--ignore-eos"],
        ["-n", "50", "--temperature", "60", "--top-p", "0.7", "--seed", "4294967297"],
        ["-n", "50", "--temperature", "9", "--top-p", "0.01", "--seed", "0"],
    ],
)
def test_generates_what_mxcompile_generates(
    run: Run, spoken: Path, capsys: pytest.CaptureFixture[str], words: list[str]
) -> None:
    arguments = [str(spoken), "--prompt", "abc ab de\nfish", *words, "--json"]
    found = run(*arguments)
    assert (found.returncode, found.stderr) == (0, "")
    assert cli.main(["run", *arguments]) == 0
    expected = json.loads(capsys.readouterr().out)
    rates = {"prefill_tokens_per_s", "decode_tokens_per_s"}
    ours = json.loads(found.stdout)
    assert ours.keys() == expected.keys()
    assert {k: ours[k] for k in ours.keys() - rates} == {
        k: expected[k] for k in ours.keys() - rates
    }


def test_a_text_is_streamed_and_read_from_stdin(run: Run, spoken: Path) -> None:
    found = run(spoken, "--prompt", "-", "-n", 3, "--ignore-eos", text="abc")
    assert found.returncode == 0
    assert found.stdout.endswith("\n")
    assert "3 + 3 tokens" in found.stderr or "2 + 3 tokens" in found.stderr
    assert run(spoken, "--prompt", "abc", "-n", 3, "-q").stderr == ""


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_a_graph_on_arrays(
    run: Run, compiled: Path, tmp_path: Path, save: Callable[..., None]
) -> None:
    rng = np.random.default_rng(0)
    feeds: dict[str, Any] = {
        "x": np.asfortranarray(rng.normal(size=(500, 4)).astype(np.float32)),
        "y": rng.normal(size=(500, 4)).astype(np.float32),
    }
    save(tmp_path / "in.npz", **feeds)
    folder = compiled / "graph.mxc"
    done = run(folder, "--input", tmp_path / "in.npz", "--output", tmp_path / "out.npz")
    assert done.returncode == 0, done.stderr
    expected = runtime.Program.load(folder).run(feeds)
    with np.load(tmp_path / "out.npz") as found:
        assert set(found) == expected.keys()
        for name, array in expected.items():
            np.testing.assert_array_equal(found[name], array)
            assert found[name].dtype == array.dtype


def test_a_decoder_on_arrays(run: Run, spoken: Path, tmp_path: Path) -> None:
    tokens = np.random.default_rng(1).integers(0, toy.VOCABULARY, 700)
    np.savez(tmp_path / "in.npz", input_ids=tokens[None])
    words = ["--input", tmp_path / "in.npz", "--output", tmp_path / "out.npz"]
    assert run(spoken, *words).returncode == 0
    found = np.load(tmp_path / "out.npz")["logits"]
    np.testing.assert_array_equal(found, toy.logits(tokens.tolist())[None])


@pytest.mark.parametrize(
    ("feeds", "message"),
    [
        ({"x": np.ones((2, 4), np.float32)}, "inputs missing or unknown: y; expected x: float32"),
        ({"x": np.ones((2, 4)), "y": np.ones((2, 4), np.float32)}, r"x: float64\[2, 4\] does not"),
        ({k: np.ones((n, 4), np.float32) for k, n in (("x", 2), ("y", 3))}, r"y: float32\[3, 4\]"),
        ({"x": np.array(["text"])}, "an array of type '<U4"),
        ({"x": np.array([None])}, "an array of type '|O"),
    ],
)
def test_arrays_that_do_not_fit(
    run: Run, compiled: Path, tmp_path: Path, feeds: dict[str, Any], message: str
) -> None:
    np.savez(tmp_path / "in.npz", **feeds)
    words = ["--input", tmp_path / "in.npz", "--output", tmp_path / "out.npz"]
    refused(run(compiled / "graph.mxc", *words), message)
    assert not (tmp_path / "out.npz").exists()


def test_bench_has_the_keys_of_mxcompile_bench(
    run: Run, spoken: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [spoken, "-p", 16, "-n", 4, "-d", "0,600", "-r", 2]
    words += ["-t", "1,2" if runtime.cores() > 1 else "1"]
    assert cli.main(["bench", *map(str, words), "--json"]) == 0
    expected = json.loads(capsys.readouterr().out)
    found = json.loads(run(*words, "--bench").stdout)
    measured = {"tokens_per_s", "stddev"}
    assert [row.keys() for row in found] == [row.keys() for row in expected]
    for ours, theirs in zip(found, expected, strict=True):
        same = ours.keys() - measured
        assert {k: ours[k] for k in same} == {k: theirs[k] for k in same}
        assert ours["tokens_per_s"] > 0


# Refusals


def refused(done: subprocess.CompletedProcess[str], message: str, code: int = 2) -> None:
    """One line on stderr that says ``message``, nothing on stdout, and the exit code."""
    assert done.returncode == code, done
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert re.search(message, done.stderr), done.stderr


def refused_alike(run: Run, folder: Path) -> str:
    """Both runtimes refuse an artifact, for the same reason."""
    done = run(folder, "--prompt", "abc")
    with pytest.raises(MxError) as raised:
        runtime.Program.load(folder)
    refused(done, "")
    ours = done.stderr.removeprefix("mxrun: error: ").strip()
    assert ours == str(raised.value)
    return ours


@pytest.fixture
def damaged(spoken: Path, tmp_path: Path) -> Path:
    """A copy of the artifact to damage."""
    return Path(shutil.copytree(spoken, tmp_path / "toy.mxc"))


@pytest.mark.parametrize(
    "name", ["model.so", "weights.safetensors", "plan.json", "report.html", "tokenizer.json"]
)
def test_a_changed_cut_or_missing_file(run: Run, damaged: Path, name: str) -> None:
    path = damaged / name
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert f"{name} was changed" in refused_alike(run, damaged)
    path.write_bytes(content[:-1])
    assert "copy it again" in refused_alike(run, damaged)
    path.unlink()
    assert f"{name} is missing" in refused_alike(run, damaged)
    path.symlink_to("/etc/hostname")
    assert "is a link" in refused_alike(run, damaged)


def test_no_artifact(run: Run, tmp_path: Path) -> None:
    assert "does not exist" in refused_alike(run, tmp_path / "nothing")
    refused(run(tmp_path, "--prompt", "abc"), "has no manifest.json")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "is not JSON: no key at byte 1"),
        (b"\xff\xfe\xfa", "not UTF-8"),
        (b"[" * 100000, "too deeply nested"),
        (b"[]", "not a JSON object"),
        (b"{}", "format version"),
        (b'{"format_version": 1}', "format version"),
        (b'{"format_version": 2}', "digest differs"),
    ],
)
def test_a_manifest_that_is_none(run: Run, damaged: Path, content: bytes, message: str) -> None:
    (damaged / artifact.MANIFEST).write_bytes(content)
    refused(run(damaged, "--prompt", "abc"), message)


def test_a_changed_manifest(run: Run, damaged: Path) -> None:
    path = damaged / artifact.MANIFEST
    path.write_text(path.read_text().replace('"parameters": 643', '"parameters": 644'))
    refused(run(damaged, "--prompt", "abc"), "digest differs")


def test_text_that_the_digest_must_escape_as_python_does(run: Run, damaged: Path) -> None:
    names = ('é"\\\n\x7f\0', "\U0001f600 \b\f")
    toy.edit_manifest(
        damaged, name=names[0], budget=names[1], quality={"a": 1e-320, "b": 0.1 + 0.2}
    )
    assert run(damaged, "--prompt", "abc", "-n", 1).returncode == 0


@pytest.mark.parametrize("name", ["../secret", "/etc/hostname", "a/b", "..", ".", "", "a\\b"])
def test_file_names_stay_in_the_folder(run: Run, damaged: Path, name: str) -> None:
    files = {**artifact.load(damaged).manifest.files, name: artifact.FileRecord("0" * 64, 1)}
    toy.edit_manifest(damaged, files=files)
    refused(run(damaged, "--prompt", "abc"), "outside the artifact")


def test_another_machine_or_version(run: Run, damaged: Path) -> None:
    toy.edit_manifest(damaged, target_features=("sse9", "avx9"))
    refused(run(damaged, "--prompt", "abc"), "this CPU lacks avx9, sse9")
    versions = artifact.load(damaged).manifest.versions
    toy.edit_manifest(damaged, versions={**versions, "tvm": "0.1"})
    refused(run(damaged, "--prompt", "abc"), r"made with tvm 0\.1")


def test_code_of_another_machine(run: Run, damaged: Path) -> None:
    code = bytearray((damaged / artifact.CODE).read_bytes())
    code[18:20] = (183 if code[18] == 62 else 62).to_bytes(2, "little")
    (damaged / artifact.CODE).write_bytes(code)
    seal(damaged)
    refused(run(damaged, "--prompt", "abc"), "code for (aarch64|x86-64); this machine is")
    (damaged / artifact.CODE).write_bytes(b"code")
    seal(damaged)
    refused(run(damaged, "--prompt", "abc"), "not a shared library")


def test_weights_that_do_not_fit(run: Run, damaged: Path) -> None:
    table = toy.weights()["table"]
    weights.write(damaged / artifact.WEIGHTS, {"table": table})
    seal(damaged)
    assert "has no tensor" in run(damaged, "--prompt", "abc").stderr
    changed = {"table": table[:, :8].copy(), "bias": toy.weights()["bias"]}
    weights.write(damaged / artifact.WEIGHTS, changed)
    seal(damaged)
    refused(run(damaged, "--prompt", "abc"), "does not fit its program")


def test_a_vocabulary_that_the_program_lacks(run: Run, damaged: Path) -> None:
    generation = artifact.load(damaged).manifest.generation
    assert generation is not None
    wider = artifact.Generation(toy.VOCABULARY + 1, generation.max_position_embeddings)
    toy.edit_manifest(damaged, generation=wider)
    refused(run(damaged, "--prompt", "abc"), r"output is not \[batch, seq, vocabulary\]")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "one of --prompt"),
        (["--prompt"], "--prompt needs a value"),
        (["--prompt", "abc", "--bench"], "one of --prompt"),
        (["--serve", "--key", "k"], "--serve needs --tracker HOST:PORT and --key KEY"),
        (["--serve", "--tracker", "9190", "--key", "k"], "--tracker '9190' is not HOST:PORT"),
        (["--prompt", "abc", "-n", "x"], "'x' is not a whole number"),
        (["--prompt", "abc", "--temperature", "-1"], "temperature -1"),
        (["--prompt", "abc", "--temperature", "nan"], "temperature nan"),
        (["--prompt", "abc", "--top-p", "0"], "top-p 0"),
        (["--prompt", "abc", "--context", "3001"], "takes 1 to 3000"),
        (["--prompt", "abc abc", "--context", "2"], "do not fit the context of 2"),
        (["--prompt", "abc", "-t", "4097"], "4097 threads: this process can use"),
        (["--prompt", "abc", "--what"], "no option --what"),
        (["--input", "in.npz"], "--input and --output go together"),
        (["--input", "in.npz", "--output", "out.npz"], "in.npz is missing"),
        (["--bench", "-p", "0", "-n", "0"], "0 leaves it out"),
    ],
)
def test_wrong_words(run: Run, spoken: Path, words: list[str], message: str) -> None:
    refused(run(spoken, *words), message)


def test_a_tokenizer_that_is_not_read_here(run: Run, compiled: Path, damaged: Path) -> None:
    refused(run(compiled / "toy.mxc", "--prompt", "w3"), "WordLevel model; mxrun reads BPE", 5)
    data = json.loads(letters().to_str()) | {"normalizer": {"type": "NFKD"}}
    (damaged / "tokenizer.json").write_text(json.dumps(data))
    seal(damaged)
    refused(run(damaged, "--prompt", "abc"), "the normalizer NFKD; mxrun reads", 5)
    refused(run(compiled / "graph.mxc", "--prompt", "w3"), "not a language model")


def test_sha256_with_and_without_instructions_for_it(mxrun: Path, tmp_path: Path) -> None:
    (tmp_path / "main.cpp").write_text("""
        #include <cstdio>
        #include "sha256.h"
        int main() {
            std::string text;
            for (int i = 0; i < 300; ++i, text += static_cast<char>(7 * i)) {
                std::puts(mx::sha256(text).c_str());
                std::puts(mx::sha256(text, true).c_str());
            }
        }""")
    sources = ROOT / "targets" / "runner"
    files = [tmp_path / "main.cpp", sources / "sha256.cpp", sources / "cpu.cpp"]
    command = ["c++", "-std=c++17", "-O1", f"-I{sources}", *map(str, files)]
    subprocess.run([*command, "-o", str(tmp_path / "main")], check=True)
    found = subprocess.run([tmp_path / "main"], capture_output=True, text=True, check=True)
    text = bytes(7 * i % 256 for i in range(1, 300))
    expected = [hashlib.sha256(text[:i]).hexdigest() for i in range(300) for _ in "ab"]
    assert found.stdout.split() == expected


# Tokenizers


def lines(count: int, seed: int) -> list[str]:
    """Text in all scripts that Python knows: prose, blocks of Unicode, characters at random."""
    rng = random.Random(seed)
    prose = [
        line for topic in topics.topics.values() for line in topic.splitlines() if line.strip()
    ]
    known = [c for c in map(chr, range(sys.maxunicode)) if unicodedata.category(c)[0] != "C"]
    blocks: dict[int, list[str]] = {}
    for c in known:
        blocks.setdefault(ord(c) >> 7, []).append(c)
    scripts = list(blocks.values())
    marks = [
        "  ",
        "\n\n",
        "\r\n \t",
        "'s ",
        "I'LL '\u017f 12345 ",
        "<|eos|>",
        "<bos>",
        "</s> ",
        "<unk>",
        "\x00\x7f",
    ]
    found = []
    for _ in range(count):
        kind = rng.random()
        if kind < 0.4:
            text = rng.choice(prose)
        elif kind < 0.8:
            script = rng.choice(scripts)
            text = "".join(
                rng.choice(script if rng.random() > 0.15 else " \t\n 0'.,")
                for _ in range(rng.randrange(1, 60))
            )
        else:
            text = "".join(rng.choices(known, k=rng.randrange(1, 20)))
        if rng.random() < 0.3:
            text += rng.choice(prose)
        if rng.random() < 0.1:
            text = rng.choice(marks) + text
        found.append(text)
    return found


LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
GPT4 = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*"
    r"|\s*[\r\n]|\s+(?!\S)|\s+"
)
GPT4O = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+"
    r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
DEEPSEEK = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def byte_level(
    pattern: str, *before: Any, nfc: bool = False, ignore_merges: bool = False
) -> Tokenizer:
    """A byte-level tokenizer that splits at a pattern, trained on ``lines``."""
    found = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    if nfc:
        found.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    found.pre_tokenizer = pre_tokenizers.Sequence([*before, split, level])
    found.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1000,
        special_tokens=["<|eos|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    found.train_from_iterator(lines(2000, 1), trainer)
    found.add_tokens(
        [
            AddedToken("I'LL", single_word=True),
            AddedToken("12345", lstrip=True, rstrip=True, normalized=True),
        ]
    )
    marks = processors.TemplateProcessing(single="<|eos|> $A", special_tokens=[("<|eos|>", 0)])
    found.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), marks])
    return found


def sentence_piece(normalizer: Any, splitter: Any, decoder: Any, **model: bool) -> Tokenizer:
    """A tokenizer such as SentencePiece's are converted to, trained on ``lines``."""
    found = Tokenizer(models.BPE(unk_token="<unk>"))
    if normalizer is not None:
        found.normalizer = normalizer
    words = pre_tokenizers.Split("▁", "merged_with_next")
    found.pre_tokenizer = splitter or words  # or training would see no words
    found.decoder = decoder
    fallback = [f"<0x{byte:02X}>" for byte in range(256)] if model.get("byte_fallback") else []
    trainer = trainers.BpeTrainer(
        vocab_size=1000,
        limit_alphabet=300,
        special_tokens=["<unk>", "<s>", "</s>", *fallback],
        show_progress=False,
    )
    found.train_from_iterator(lines(2000, 2), trainer)
    data = json.loads(found.to_str())
    data["model"] |= model
    data["pre_tokenizer"] = data["pre_tokenizer"] if splitter else None
    data["added_tokens"] = [t for t in data["added_tokens"] if t["content"] not in fallback]
    found = Tokenizer.from_str(json.dumps(data))
    found.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return found


def llama2_decoder() -> Any:
    replace, strip = decoders.Replace("▁", " "), decoders.Strip(" ", 1, 0)
    return decoders.Sequence([replace, decoders.ByteFallback(), decoders.Fuse(), strip])


def metaspace(scheme: str, *, split: bool) -> Any:
    return pre_tokenizers.Metaspace(replacement="▁", prepend_scheme=scheme, split=split)


KINDS: dict[str, Callable[[], Tokenizer]] = {
    "llama3": lambda: byte_level(LLAMA3, ignore_merges=True),
    "qwen": lambda: byte_level(LLAMA3.replace("{1,3}", ""), nfc=True),
    "gpt4": lambda: byte_level(GPT4),
    "gpt4o": lambda: byte_level(GPT4O),
    "deepseek": lambda: byte_level(
        DEEPSEEK,
        pre_tokenizers.Split(Regex(r"\p{N}{1,3}"), "isolated"),
        pre_tokenizers.Split(Regex("[\u4e00-\u9fa5\u3040-\u30ff]+"), "isolated"),
    ),
    "digits": lambda: byte_level(r"\s?\w+|\W", pre_tokenizers.Digits(individual_digits=True)),
    "llama2": lambda: sentence_piece(
        normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]),
        None,
        llama2_decoder(),
        byte_fallback=True,
        fuse_unk=True,
    ),
    "mistral": lambda: sentence_piece(
        None, metaspace("first", split=False), llama2_decoder(), byte_fallback=True, fuse_unk=True
    ),
    "gemma": lambda: sentence_piece(
        normalizers.Replace(" ", "▁"),
        pre_tokenizers.Split(" ", "merged_with_previous"),
        decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]),
        byte_fallback=True,
    ),
    "metaspace": lambda: sentence_piece(
        None, metaspace("always", split=True), decoders.Metaspace(), fuse_unk=False
    ),
}


def translate(run: Run, path: Path, option: str, values: list[Any]) -> list[Any]:
    done = run(path, option, text="".join(json.dumps(value) + "\n" for value in values))
    assert (done.returncode, done.stderr) == (0, "")
    return [json.loads(line) for line in done.stdout.splitlines()]


def check_exact(run: Run, path: Path, text: list[str]) -> None:
    """Compare encoding of lines, and decoding of those and of tokens at random."""
    theirs = Tokenizer.from_file(str(path))
    expected = [found.ids for found in theirs.encode_batch(text)]
    assert translate(run, path, "--encode", text) == expected
    rng = random.Random(0)
    size = theirs.get_vocab_size()
    tokens = [
        ids if number % 2 else [rng.randrange(size) for _ in ids]
        for number, ids in enumerate(expected)
    ]
    assert translate(run, path, "--decode", tokens) == theirs.decode_batch(tokens)


def test_the_bundled_tokenizer_on_ten_thousand_lines(run: Run) -> None:
    check_exact(run, ROOT / "models" / "tinylm" / "tokenizer.json", lines(10_000, 0))


@pytest.mark.parametrize("kind", KINDS)
def test_tokenizers_of_each_kind(run: Run, tmp_path: Path, kind: str) -> None:
    KINDS[kind]().save(str(tmp_path / "tokenizer.json"))
    check_exact(run, tmp_path / "tokenizer.json", lines(1500, 3))


def test_gemmas_tokenizer_on_ten_thousand_lines(run: Run) -> None:
    path = ROOT / "build" / "gemma" / "tokenizer.json"
    if not path.is_file():
        pytest.skip("no build/gemma/tokenizer.json, which mxcompile export writes")
    check_exact(run, path, lines(10_000, 0))


def test_every_character_is_classified_as_by_the_library(run: Run, tmp_path: Path) -> None:
    found = byte_level(GPT4O, nfc=True)
    found.save(str(tmp_path / "tokenizer.json"))
    text = "".join(f"a{chr(c)}" for c in range(sys.maxunicode + 1) if not 0xD800 <= c < 0xE000)
    parts = [text[at : at + 3000] for at in range(0, len(text), 3000)]
    expected = [ids.ids for ids in found.encode_batch(parts)]
    assert translate(run, tmp_path / "tokenizer.json", "--encode", parts) == expected


ODD = "abcdkK\u212as\u017f x{}\n-]E"


@pytest.mark.parametrize(
    "pattern",
    [
        "a|ab|abc",
        "(?:a|ab)(?:c|bcd)?",
        "(a+b?){2,3}",
        "(ab){2}",
        "a{2,}?b",
        "a{,2}b",
        "(?:ab|a)++b",
        "(?>a+)b",
        "a*+b",
        "(?=ab)a|b(?!a)",
        "[^a-c\\s]+",
        "[\\p{^L}]",
        "\\P{Ll}+",
        "(?i:STRASSE|k)",
        "^a|b$",
        "a.b",
        "\\x61\\u0062|\\x{63}",
        "[-a]|[a\\-c]+|[]a]",
        "x{a}|a{b",
        "(?:(?:a|b)+c?)+",
        "a??b|\\Sa",
    ],
)
def test_patterns(run: Run, tmp_path: Path, pattern: str) -> None:
    found = Tokenizer(models.BPE({c: n for n, c in enumerate(ODD)}, []))
    found.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), "removed")  # shows what matches
    found.save(str(tmp_path / "tokenizer.json"))
    rng = random.Random(0)
    text = ["".join(rng.choices("aabb" + ODD, k=rng.randrange(12))) for _ in range(400)]
    expected = [ids.ids for ids in found.encode_batch(text)]
    assert translate(run, tmp_path / "tokenizer.json", "--encode", text) == expected


@pytest.mark.parametrize(
    "pattern", ["(a", "a)", "(?<=a)b", "\\p{Han}", "(a?)*", "*", "[a[b]]", "\\1"]
)
def test_patterns_that_are_not_read(run: Run, tmp_path: Path, pattern: str) -> None:
    data = json.loads(letters().to_str())
    split = {
        "type": "Split",
        "pattern": {"Regex": pattern},
        "behavior": "Isolated",
        "invert": False,
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(data | {"pre_tokenizer": split}))
    refused(run(tmp_path / "tokenizer.json", "--encode"), "which mxrun does not read", 5)


def test_a_pattern_that_would_take_for_ever(run: Run, tmp_path: Path) -> None:
    data = json.loads(letters().to_str())
    split = {
        "type": "Split",
        "pattern": {"Regex": "(?:a+)+b"},
        "behavior": "Isolated",
        "invert": False,
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(data | {"pre_tokenizer": split}))
    done = run(tmp_path / "tokenizer.json", "--encode", text=json.dumps("a" * 60) + "\n")
    refused(done, "takes too long", 5)


# Damage


def test_damaged_artifacts_are_refused_under_sanitizers(spoken: Path, tmp_path: Path) -> None:
    if shutil.which("c++") is None or shutil.which("cc") is None:
        pytest.skip("no C and C++ compilers")
    script = ROOT / "scripts" / "fuzz_runner.py"
    command = [sys.executable, str(script), str(spoken), "--count", "300"]
    done = subprocess.run(
        [*command, "--cache", str(conftest.RUNNERS)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "315 damaged, 0 findings" in done.stdout
