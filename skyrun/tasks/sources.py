"""The repositories that models are downloaded from. This table is the only place that names them."""

from dataclasses import dataclass

DEFAULT_QUANT = "Q8_0"  # if no plan decides the type


@dataclass(frozen=True)
class Source:
    """The repositories of one model.

    tasks: that it does; none if its name is that of its task. checkpoint: the published one, which is converted as far
    as nothing else is there. leave_out: folders of it that other tasks use, or none. gguf, text_encoder: repositories
    with GGUF files of the transformer and of the text encoder, which are looked into first; "OWNER/NAME@COMMIT" is used
    as it was at that commit.
    """

    checkpoint: str
    leave_out: tuple[str, ...] = ()
    gguf: tuple[str, ...] = ()
    text_encoder: tuple[str, ...] = ()
    tasks: tuple[str, ...] = ()


_SKYREELS = ("vantagewithai/SkyReels-V3-14B-GGUF",)
_UMT5 = ("city96/umt5-xxl-encoder-gguf",)
_ASIDE = ("assets", "examples", "xlm-roberta-large")


def _wan(task: str, checkpoint: str, *gguf: str) -> Source:
    return Source(checkpoint, _ASIDE, gguf, _UMT5, (task,))


def _forced(checkpoint: str) -> Source:
    return Source(checkpoint, _ASIDE, (), _UMT5, ("t2v", "i2v"))


SOURCES = {
    "r2v": Source("Skywork/SkyReels-V3-R2V-14B", gguf=_SKYREELS, text_encoder=_UMT5),
    "v2v": Source("Skywork/SkyReels-V3-V2V-14B", ("shot_transformer",), gguf=_SKYREELS, text_encoder=_UMT5),
    "shot": Source("Skywork/SkyReels-V3-V2V-14B", ("transformer",), text_encoder=_UMT5),
    "a2v": Source("Skywork/SkyReels-V3-A2V-19B", ("xlm-roberta-large",), gguf=_SKYREELS, text_encoder=_UMT5),
    "t2v": _wan("t2v", "Skywork/SkyReels-V2-T2V-14B-540P", "wsbagnsv1/SkyReels-V2-T2V-14B-540P-GGUF"),
    "t2v-720p": _wan("t2v", "Skywork/SkyReels-V2-T2V-14B-720P", "wsbagnsv1/SkyReels-V2-T2V-14B-720P-GGUF"),
    "wan2.1-t2v-1.3b": _wan("t2v", "Wan-AI/Wan2.1-T2V-1.3B"),
    "wan2.1-t2v-14b": _wan("t2v", "Wan-AI/Wan2.1-T2V-14B", "city96/Wan2.1-T2V-14B-gguf"),
    "i2v": _wan("i2v", "Skywork/SkyReels-V2-I2V-14B-540P", "wsbagnsv1/SkyReels-V2-I2V-14B-540P-GGUF"),
    "i2v-720p": _wan("i2v", "Skywork/SkyReels-V2-I2V-14B-720P", "wsbagnsv1/SkyReels-V2-I2V-14B-720P-GGUF"),
    "i2v-1.3b": _wan("i2v", "Skywork/SkyReels-V2-I2V-1.3B-540P"),
    "wan2.1-i2v-480p": _wan("i2v", "Wan-AI/Wan2.1-I2V-14B-480P", "city96/Wan2.1-I2V-14B-480P-gguf"),
    "wan2.1-i2v-720p": _wan("i2v", "Wan-AI/Wan2.1-I2V-14B-720P", "city96/Wan2.1-I2V-14B-720P-gguf"),
    "df": _forced("Skywork/SkyReels-V2-DF-14B-540P"),
    "df-720p": _forced("Skywork/SkyReels-V2-DF-14B-720P"),
    "df-1.3b": _forced("Skywork/SkyReels-V2-DF-1.3B-540P"),
}


BUILT_IN = {"demo": "r2v"}  # models that come with the package, and their tasks


def tasks_of(model: str) -> tuple[str, ...]:
    """The tasks that a model of the table does; the first one is meant where nothing else is said."""
    return SOURCES[model].tasks or (model,)


def model_beside(repository: str, task: str) -> str:
    """The model of the table that a repository belongs to, whose other files go with it; else that of the task.

    task: that it is for, or "".
    """
    for name, source in SOURCES.items():
        there = {pinned(one)[0] for one in (source.checkpoint, *source.gguf)}
        if repository in there and task in ("", *tasks_of(name)):
            return name
    return task or next(iter(SOURCES))


def pinned(source: str) -> tuple[str, str | None]:
    """The name of a repository, and the commit of it that is to be used, if one is given."""
    name, _, commit = source.partition("@")
    return name, commit or None
