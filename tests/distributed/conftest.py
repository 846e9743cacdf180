"""Trainings of two and of four ranks that several tests look at: starting ranks costs more than training them."""

import pytest
from engine_launching import case, run_cases

import tiny_decoders
from data_prep.files import write_json
from tiny_runs import RECIPE


@pytest.fixture(scope="session")
def engine_recipe(tmp_path_factory, teacher_folder, shards_folder):
    folder = tmp_path_factory.mktemp("engines")
    path = folder / "recipe.yaml"
    path.write_text(RECIPE.format(out=folder / "run", shards=shards_folder, teacher=teacher_folder))
    return path


@pytest.fixture(scope="session")
def decoder_recipe(tmp_path_factory):
    """A Mixtral student of a LLaMA teacher."""
    folder = tmp_path_factory.mktemp("engines of decoders")
    teacher = tiny_decoders.write_decoder(folder / "teacher", "llama", num_hidden_layers=3, vocab_size=112)
    student = tiny_decoders.write_decoder(folder / "student", "mixtral", seed=1)
    rows = tiny_decoders.write_blocks(folder / "rows")
    path = folder / "recipe.yaml"
    path.write_text(tiny_decoders.RECIPE.format(out=folder / "run", shards=rows, teacher=teacher, student=student))
    return path


@pytest.fixture(scope="session")
def zero_3_whatever_the_size(tmp_path_factory):
    """ZeRO 3 as in ds_configs, but so that parameters as small as those of tests are cut, too."""
    path = tmp_path_factory.mktemp("settings") / "zero3.json"
    write_json(path, {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}})
    return path


@pytest.fixture(scope="session")
def two_ranks(engine_recipe, decoder_recipe, zero_3_whatever_the_size):
    """Differences from the bare loop over three steps; `saved` is a checkpoint of the last one."""
    folder = engine_recipe.parent / "two"
    cases = {
        "ZeRO 0, clipped": case("zero0", experts=2, micro=8, clip=0.05, poison=True, reseed=True),
        "ZeRO 1": case("zero1", experts=2, micro=8, poison=True, save=folder / "a"),
        "ZeRO 2, accumulation, clipped": case("zero2", experts=2, micro=4, clip=0.05, poison=True),
        "ZeRO 3, an expert without tokens": case(
            zero_3_whatever_the_size, experts=2, micro=4, starve=True, poison=True
        ),
        "a decoder at ZeRO 3": case(
            zero_3_whatever_the_size,
            experts=2,
            micro=4,
            recipe=decoder_recipe,
            # Adam turns the rounding of gradients near 0 into steps of full size; not so with this.
            flags=("--optimizer.epsilon", "1e-5", "--loss.hidden_cosine", "0.2", "--loss.hidden_layers", "[0, 2]"),
            save=folder / "c",
        ),
        "ZeRO 2 offloaded, recomputed": case("zero2_offload", experts=2, micro=8, recompute=True, reseed=True),
        "ZeRO 3 offloaded, accumulation": case("zero3_offload", experts=2, micro=4, reseed=True),
        "bf16 at ZeRO 1, accumulation": case(
            "zero1", experts=2, micro=4, precision="bf16", poison=True, save=folder / "b"
        ),
        **{f"bf16 at ZeRO {stage}": case(f"zero{stage}", micro=8, precision="bf16", poison=True) for stage in (2, 3)},
    }
    return run_cases(engine_recipe, cases, ranks=2, folder=folder)


@pytest.fixture(scope="session")
def four_ranks(engine_recipe, two_ranks):
    """The same on four ranks; the second case goes on from a checkpoint of two."""
    folder = engine_recipe.parent / "four"
    cases = {
        "ZeRO 2, each rank one expert": case("zero2", experts=4, micro=4, clip=0.05, save=folder / "a"),
        "ZeRO 3, from two ranks": case("zero3", experts=2, micro=2, resume=two_ranks["ZeRO 1"]["saved"], reseed=True),
    }
    return run_cases(engine_recipe, cases, ranks=4, folder=folder)
