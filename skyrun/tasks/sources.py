"""The repositories that models are downloaded from. This table is the only place that names them."""

from dataclasses import dataclass

DEFAULT_QUANT = "Q8_0"  # if no plan decides the type


@dataclass(frozen=True)
class Source:
    """The repositories of one task.

    checkpoint: the published one, which is converted as far as nothing else is there. leave_out: folders of it that
    other tasks use, or none. gguf, text_encoder: repositories with GGUF files of the transformer and of the text
    encoder, which are looked into first; "OWNER/NAME@COMMIT" is used as it was at that commit.
    """

    checkpoint: str
    leave_out: tuple[str, ...] = ()
    gguf: tuple[str, ...] = ()
    text_encoder: tuple[str, ...] = ()


_SKYREELS = ("vantagewithai/SkyReels-V3-14B-GGUF",)
_UMT5 = ("city96/umt5-xxl-encoder-gguf",)

SOURCES = {
    "r2v": Source("Skywork/SkyReels-V3-R2V-14B", gguf=_SKYREELS, text_encoder=_UMT5),
    "v2v": Source("Skywork/SkyReels-V3-V2V-14B", ("shot_transformer",), gguf=_SKYREELS, text_encoder=_UMT5),
    "shot": Source("Skywork/SkyReels-V3-V2V-14B", ("transformer",), text_encoder=_UMT5),
    "a2v": Source("Skywork/SkyReels-V3-A2V-19B", ("xlm-roberta-large",), gguf=_SKYREELS, text_encoder=_UMT5),
}


BUILT_IN = {"demo": "r2v"}  # models that come with the package, and their tasks


def pinned(source: str) -> tuple[str, str | None]:
    """The name of a repository, and the commit of it that is to be used, if one is given."""
    name, _, commit = source.partition("@")
    return name, commit or None
