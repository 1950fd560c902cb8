"""The command line: what is accepted, what it means, and what is chosen where nothing is said."""

import json
import shlex

import pytest

import train as train_script
from transformer_scratch.config import Config, load_config


def parsed(flags: str) -> Config:
    config, _, _, checkpoint = load_config(shlex.split(flags))
    assert checkpoint is None
    return config


def test_the_articles_command_line():
    config = parsed(
        "--accelerator cpu --devices 1 --batch_size 256 --num_datas 50000 --max_epochs 10 "
        "--lr 0.0001 --num_heads 8 --dim 512"
    )
    assert (config.accelerator, config.devices, config.batch_size) == ("cpu", 1, 256)
    assert (config.num_datas, config.max_epochs, config.lr) == (50_000, 10, 0.0001)
    assert (config.num_heads, config.dim, config.num_layers) == (8, 512, 6)
    assert config.ffn_dim == 2048


def test_dashes_and_underscores():
    dashes = (
        "--num-heads 2 --no-compile --wandb-project p --log-every 3 --save-top-k 2 --clip-norm 0"
    )
    underscores = (
        "--num_heads 2 --no_compile --wandb_project p --log_every 3 --save_top_k 2 --clip_norm 0"
    )
    config = parsed(dashes)
    assert parsed(underscores) == config
    assert (config.num_heads, config.wandb_project) == (2, "p")
    assert (config.save_top_k, config.clip_norm) == (2, 0)
    assert parsed("--no-tie-embeddings").tie_embeddings is False
    assert parsed("--debug").debug is True and parsed("").debug is False


def test_the_contracts_flags_and_defaults():
    """Every flag of the contract, and the defaults it names."""
    names = """
        accelerator devices lr max_epochs num_datas batch_size num_heads dim debug
        num_layers ffn_dim dropout tie_embeddings num_categories seq_len holdout
        pairs val_pairs test_pairs warmup_steps schedule label_smoothing average
        weight_decay clip_norm accumulate amp compile num_workers seed
        log_every save_every save_top_k run_dir resume wandb wandb_project
    """
    defaults = Config()
    assert set(names.split()) <= set(vars(defaults))
    assert (defaults.dim, defaults.num_heads, defaults.seed, defaults.num_layers) == (32, 1, 42, 6)
    assert (defaults.save_top_k, defaults.tie_embeddings, defaults.schedule) == (
        10,
        True,
        "constant",
    )
    config = load_config([])[0]
    assert (config.num_categories, config.seq_len, config.holdout) == (10, 16, 0.2)
    assert (defaults.accelerator, defaults.amp, defaults.wandb) == ("auto", "auto", "auto")


@pytest.mark.parametrize("dim", [16, 32, 512])
def test_what_is_chosen_comes_with_its_reason(dim):
    config, _, reasons, _ = load_config(["--dim", str(dim)])
    for name in ("lr", "ffn_dim", "seq_len"):
        assert getattr(config, name) is not None and reasons[name]
    assert config.ffn_dim == 4 * dim and config.seq_len == 16
    assert reasons["device"] and reasons["precision"]
    assert config.accelerator in ("cpu", "gpu", "mps") and config.amp in ("off", "bf16", "fp16")
    json.dumps(vars(config))


def test_a_wider_model_learns_at_a_smaller_rate():
    rates = [parsed(f"--dim {dim}").lr for dim in (16, 32, 128, 512)]
    assert rates == sorted(rates, reverse=True) and len(set(rates)) == 4
    assert parsed("--dim 512 --lr 0.25").lr == 0.25


def test_help_explains_every_flag(capsys):
    with pytest.raises(SystemExit) as end:
        train_script.main(["--help"])
    text = capsys.readouterr().out
    assert end.value.code == 0
    for name in vars(Config()):
        assert f"--{name.replace('_', '-')}" in text
