"""A toy-scale run of the whole training ends in a checkpoint folder of the published layout."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
onnx = pytest.importorskip("onnx")

from safetensors import safe_open  # noqa: E402

from pochade.export.families.meissonic import Meissonic  # noqa: E402
from pochade.export.recipes import choose, read_recipes  # noqa: E402
from pochade.starter import train  # noqa: E402
from pochade.starter.build import main  # noqa: E402
from pochade.starter.data import Batches, mask_counts, starter_tokenizer  # noqa: E402
from pochade.starter.evaluate import CATEGORIES  # noqa: E402
from pochade.starter.model import MASK  # noqa: E402
from pochade.starter.schedule import Budget, rate_factor  # noqa: E402
from pochade.starter.train import Trainer, run  # noqa: E402

KEYS = {
    "model_index.json": "_class_name _diffusers_version scheduler text_encoder tokenizer transformer vqvae",
    "scheduler/scheduler_config.json": "_class_name _diffusers_version mask_token_id masking_schedule",
    "tokenizer/tokenizer_config.json": (
        "add_prefix_space added_tokens_decoder bos_token clean_up_tokenization_spaces do_lower_case eos_token errors "
        "model_max_length pad_token tokenizer_class unk_token"
    ),
    "tokenizer/special_tokens_map.json": "bos_token eos_token pad_token unk_token",
    "transformer/config.json": (
        "_class_name _diffusers_version attention_head_dim axes_dims_rope codebook_size downsample guidance_embeds "
        "in_channels joint_attention_dim num_attention_heads num_layers num_single_layers patch_size "
        "pooled_projection_dim upsample vocab_size"
    ),
    "vqvae/config.json": (
        "_class_name _diffusers_version act_fn block_out_channels down_block_types force_upcast in_channels "
        "latent_channels layers_per_block lookup_from_codebook mid_block_add_attention norm_num_groups norm_type "
        "num_vq_embeddings out_channels sample_size scaling_factor up_block_types vq_embed_dim"
    ),
    "text_encoder/config.json": (
        "architectures attention_dropout bos_token_id dropout eos_token_id hidden_act hidden_size initializer_factor "
        "initializer_range intermediate_size layer_norm_eps max_position_embeddings model_type num_attention_heads "
        "num_hidden_layers pad_token_id projection_dim torch_dtype transformers_version vocab_size"
    ),
}


# Networks this small only wait for one another's threads.
torch.set_num_threads(1)


def toy_trainer(**sizes: int) -> Trainer:
    batches = Batches(starter_tokenizer(), np.random.default_rng(0), size=4)
    return Trainer(batches, 1e-3, True, 0, False, **({"dim": 64, "layers": 1, "single_layers": 1} | sizes))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("toy")
    main(["--out", str(folder), "--samples", "8", "--codec-samples", "4", "--judge", "1", "--toy", "--threads", "1"])
    return folder / "checkpoint"


@pytest.mark.parametrize("name", KEYS)
def test_json_files_have_the_published_keys(checkpoint: Path, name: str) -> None:
    assert sorted(json.loads((checkpoint / name).read_text("utf-8"))) == sorted(KEYS[name].split())


def test_weights_are_float32_and_complete(checkpoint: Path) -> None:
    for name in ("transformer/diffusion_pytorch_model", "text_encoder/model", "vqvae/diffusion_pytorch_model"):
        with safe_open(checkpoint / f"{name}.safetensors", "pt") as file:
            # safe_open is no dict: it has to be asked for its keys.
            assert {file.get_slice(key).get_dtype() for key in file.keys()} == {"F32"}  # noqa: SIM118
    vocab = json.loads((checkpoint / "tokenizer/vocab.json").read_text("utf-8"))
    assert json.loads((checkpoint / "text_encoder/config.json").read_text("utf-8"))["vocab_size"] == len(vocab)


def test_the_checkpoint_is_taken_by_the_exporter(checkpoint: Path) -> None:
    opened = Meissonic.open(checkpoint)
    assert opened.codec.factor == 8
    assert choose(read_recipes(), checkpoint, None).name == "starter"


def test_the_bundle_has_the_exporters_operations_and_not_those_for_training(checkpoint: Path) -> None:
    graph = onnx.load(checkpoint.parent / "fp32" / "transformer.onnx", load_external_data=False).graph
    operations = {node.op_type for node in graph.node}
    assert {"MultiHeadAttention", "SimplifiedLayerNormalization", "FastGelu"} <= operations
    assert "Softmax" not in operations


def test_the_card_tells_what_was_made(checkpoint: Path) -> None:
    card = (checkpoint.parent / "CARD.md").read_text("utf-8")
    assert "Apache-2.0" in card
    assert sum(line.startswith("| ") and "/1 = " in line for line in card.splitlines()) == len(CATEGORIES)


def test_a_finished_run_is_not_trained_again(checkpoint: Path) -> None:
    folder = checkpoint.parent
    before = (folder / "codec.pt").stat().st_mtime_ns, (folder / "CARD.md").read_text("utf-8")
    main(["--out", str(folder), "--samples", "8", "--codec-samples", "4", "--judge", "1", "--toy", "--threads", "1"])
    after = (folder / "codec.pt").stat().st_mtime_ns, (folder / "CARD.md").read_text("utf-8")
    # The time of a run grows with its restarts.
    assert after[0] == before[0]
    assert after[1].splitlines()[-len(CATEGORIES) :] == before[1].splitlines()[-len(CATEGORIES) :]


def test_an_interrupted_run_goes_on_as_if_it_had_not_stopped(tmp_path: Path) -> None:
    whole, half = toy_trainer(), toy_trainer()
    run(whole, tmp_path / "whole", Budget(samples=16))
    run(half, tmp_path / "parts", Budget(samples=8))
    rest = toy_trainer()
    rest.resume(tmp_path / "parts")
    assert rest.step == 2
    run(rest, tmp_path / "parts", Budget(samples=16))
    for name, weight in whole.ema.items():
        assert torch.allclose(weight, rest.ema[name], atol=1e-5), name


def test_a_run_that_ignores_its_captions_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = toy_trainer()
    monkeypatch.setattr(train, "SEPARATED_BY", 2)
    with pytest.raises(train.CaptionIgnoredError, match="after 2 steps"):
        run(trainer, tmp_path, Budget(samples=400), test_steps=1)
    assert trainer.step == 2


def test_training_lowers_the_loss() -> None:
    trainer = toy_trainer()
    losses = [trainer.train_step(0.1) for _ in range(12)]
    assert np.mean(losses[-3:]) < losses[0] - 0.1


def test_batches_mask_what_they_ask_for() -> None:
    batch = Batches(starter_tokenizer(), np.random.default_rng(0), size=16).next()
    flat = batch.tokens.flatten(1)
    asked = batch.weights > 0
    assert (flat.gather(1, batch.cells)[asked] == MASK).all()
    assert batch.weights.sum().item() == pytest.approx(1)
    counts = mask_counts(2000, np.random.default_rng(0))
    assert counts.min() >= 1
    assert 0.42 < (counts >= 251).mean() < 0.56


def test_rate_warms_up_and_decays() -> None:
    assert rate_factor(0, 0.0) < 0.01
    assert rate_factor(1000, 0.4) == 1.0
    assert rate_factor(1000, 1.0) == pytest.approx(0.03)
