"""The repositories that models are downloaded from. This table is the only place that names them."""

from dataclasses import dataclass

DEFAULT_QUANT = "Q8_0"  # if no plan decides the type


@dataclass(frozen=True)
class Source:
    """The repositories of one task.

    checkpoint: the published one; it is converted if there is no GGUF file of the wanted type. leave_out: its folders
    that this task does not use. gguf: repositories of GGUF files, which are searched first.
    """

    checkpoint: str
    leave_out: tuple[str, ...] = ()
    gguf: tuple[str, ...] = ()


SOURCES = {
    "r2v": Source("Skywork/SkyReels-V3-R2V-14B"),
    "v2v": Source("Skywork/SkyReels-V3-V2V-14B", leave_out=("shot_transformer",)),
    "shot": Source("Skywork/SkyReels-V3-V2V-14B", leave_out=("transformer",)),
    "a2v": Source("Skywork/SkyReels-V3-A2V-19B", leave_out=("xlm-roberta-large",)),
}
