"""``mim-refiner analyze``."""

from __future__ import annotations

from mim_refiner.cli.common import (
    CompareOption,
    DataOption,
    DeviceOption,
    EncoderOption,
    HeadsOption,
    JsonOption,
    KeyMapOption,
    ModelOption,
    OutOption,
    QuietOption,
    SeedOption,
    TestOption,
    execute,
    model_source,
)


def analyze(
    model: ModelOption,
    data: DataOption,
    out: OutOption,
    compare: CompareOption = None,
    test: TestOption = None,
    device: DeviceOption = "auto",
    seed: SeedOption = 0,
    encoder: EncoderOption = None,
    num_heads: HeadsOption = None,
    key_map: KeyMapOption = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Draw the k-NN accuracy of every block, for one encoder or for two (PNG and JSON)."""
    from mim_refiner.commands.analyze import analyze as run

    execute(
        run,
        as_json=as_json,
        quiet=quiet,
        model=model_source(model, encoder=encoder, num_heads=num_heads, key_map=key_map),
        data=data,
        out=out,
        compare=compare,
        test=test,
        device=device,
        seed=seed,
    )
