"""Where models come from. Edit this table to use other repositories; nothing else names one."""

from dataclasses import dataclass

DEFAULT_QUANT = "Q8_0"  # where no plan says which


@dataclass(frozen=True)
class Source:
    """The repositories of one task.

    checkpoint: the published one, which is converted where there is no GGUF file of the wanted type. leave_out:
    folders of it that other tasks use, or none. gguf: repositories of GGUF files, looked into first.
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
