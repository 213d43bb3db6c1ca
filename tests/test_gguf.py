"""GGUF's blocks, names and keys, against the gguf package and values a reader checks by head."""

from __future__ import annotations

import gguf
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_quant import QuantConfig, attach
from lightning_quant.export.gguf import block_type, blocks_of
from lightning_quant.export.gguf_blocks import BLOCK_TYPES, Blocks, is_half, pack, per_block, real, unpack
from lightning_quant.export.gguf_metadata import ROPE_FREQS, extra_tensors
from lightning_quant.export.gguf_names import Part


def some_blocks(name: str) -> Blocks:
    """Every code there is, in three matrices of five rows."""
    kind = BLOCK_TYPES[name]
    low = 0 if kind.minimum else -(2 ** (kind.bits - 1))
    g = torch.Generator().manual_seed(0)
    codes = torch.randint(low, low + 2**kind.bits, (3, 5, 64), generator=g).to(torch.int8)
    scale = torch.randn(3, 5, 2, generator=g).half()
    return Blocks(codes, scale, torch.randn(3, 5, 2, generator=g).half() if kind.minimum else None)


@pytest.mark.parametrize("name", BLOCK_TYPES)
def test_bytes_are_what_ggufs_own_dequantizer_reads(name):
    blocks = some_blocks(name)
    data = pack(name, blocks)
    assert data.dtype == torch.uint8
    assert data.shape == (3, 5, 2 * BLOCK_TYPES[name].size)
    theirs = gguf.dequantize(data.numpy(), gguf.GGMLQuantizationType[name])
    assert torch.equal(torch.from_numpy(theirs), real(blocks))


@pytest.mark.parametrize("name", BLOCK_TYPES)
def test_unpacking_is_the_inverse(name):
    blocks = some_blocks(name)
    back = unpack(name, pack(name, blocks))
    assert back.codes.dtype == torch.int8
    assert torch.equal(back.codes, blocks.codes)
    assert torch.equal(back.scale, blocks.scale)
    assert (back.minimum is None) == (blocks.minimum is None)
    if blocks.minimum is not None:
        assert torch.equal(back.minimum, blocks.minimum)


@pytest.mark.parametrize("name", BLOCK_TYPES)
def test_every_byte_of_a_block_says_something(name):
    data = pack(name, some_blocks(name))[0, 0]
    before = unpack(name, data.clone())
    for place in range(BLOCK_TYPES[name].size):
        flipped = data.clone()
        flipped[place] ^= 1
        after = unpack(name, flipped)
        same = torch.equal(before.codes, after.codes) and torch.equal(before.scale, after.scale)
        assert not same or (before.minimum is not None and not torch.equal(before.minimum, after.minimum)), place


def test_hand_values():
    """Scale 1 is 0x3c00, -2 is 0xc000; elements 0 and 16 share a byte, as do 1 and 17."""
    codes = torch.zeros(1, 32, dtype=torch.int8)
    one, two = torch.ones(1, 1).half(), torch.full((1, 1), -2.0).half()
    assert pack("Q4_0", Blocks(codes, one)).tolist() == [[0x00, 0x3C] + [0x88] * 16]
    codes[0, 0], codes[0, 16], codes[0, 17] = -8, 7, -1
    assert pack("Q4_0", Blocks(codes, one)).tolist() == [[0x00, 0x3C, 0xF0, 0x78] + [0x88] * 14]
    assert pack("Q8_0", Blocks(codes, one))[0, :3].tolist() == [0x00, 0x3C, 0xF8]
    up = torch.zeros(1, 32, dtype=torch.int8)
    up[0, 0], up[0, 31] = 17, 15
    assert pack("Q5_1", Blocks(up, one, two)).tolist() == [[0, 0x3C, 0, 0xC0, 1, 0, 0, 0, 0x01] + [0] * 14 + [0xF0]]
    assert real(Blocks(up, one, two))[0, [0, 1, 31]].tolist() == [15.0, -2.0, 13.0]


def test_scales_of_rows_and_large_groups_are_repeated_per_block():
    assert per_block(torch.tensor([[1.0], [2.0]]), 96).tolist() == [[1, 1, 1], [2, 2, 2]]
    assert per_block(torch.tensor([[1.0, 2.0]]), 128).tolist() == [[1, 1, 2, 2]]
    assert is_half(torch.tensor([0.5, 0.0999755859375]))
    assert not is_half(torch.tensor([0.5, 0.1]))


KINDS = {
    "w8a16": "Q8_0",
    "w7a16": "Q8_0",
    "w6a16": "Q8_0",
    "w5a16": "Q5_0",
    "w4a16": "Q4_0",
    "w3a16": "Q4_0",
    "w1.58a16": "Q4_0",
    "w1a16": "Q4_1",  # two levels, none of them 0
    "w4a16-asym": "Q4_1",
    "w2a16-asym": "Q4_1",
    "w5a16-asym": "Q5_1",
    "w8a16-asym": None,
}


@pytest.mark.parametrize("scheme", KINDS)
def test_blocks_stand_for_what_training_computed(scheme):
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(96, 8))
    attach(net, QuantConfig.parse("lsq", scheme, target="llama.cpp"))
    layer = net[0]
    assert block_type(layer.weight_quant) == KINDS[scheme]
    if KINDS[scheme] is not None:
        blocks = blocks_of("0.weight", layer)
        assert torch.equal(real(blocks), layer.on_grid())
        assert torch.equal(real(unpack(KINDS[scheme], pack(KINDS[scheme], blocks))), layer.on_grid())


def test_integer_zero_points_ship_where_their_lowest_level_is_a_half():
    """Without the target a zero point counts steps: exact with steps that are powers of two, else refused."""
    net = torch.nn.Sequential(torch.nn.Linear(64, 8))
    attach(net, QuantConfig.parse("ste", "w4a16-g32-asym"))
    with pytest.raises(ValueError, match=r"0\.weight .*expected float16 scales, got others.*target='llama.cpp'"):
        blocks_of("0.weight", net[0])
    net[0].weight_quant.scale.copy_(net[0].weight_quant.scale.log2().round().exp2())
    blocks = blocks_of("0.weight", net[0])
    assert blocks.minimum.unique().numel() > 1
    assert torch.equal(real(blocks), net[0].on_grid())


def test_rotary_rows_are_interleaved_as_llama_cpps_converter_does():
    x = torch.randn(48, 5)
    part = Part("attn_q.weight", heads=3)
    assert torch.equal(part.rows(x), x.reshape(3, 2, 8, 5).swapaxes(1, 2).reshape(48, 5))
    assert torch.equal(part.back(part.rows(x)), x)
    assert part.rows(torch.arange(4.0)[:, None].repeat(3, 1))[:4, 0].tolist() == [0, 2, 1, 3]
    assert torch.equal(part.back(part.rows(x[:, 0])), x[:, 0])


def test_llama_3s_frequencies_are_divided_as_transformers_does():
    rope = {"rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope["original_max_position_embeddings"] = 64
    config = LlamaConfig(vocab_size=8, hidden_size=64, num_hidden_layers=1, num_attention_heads=2, rope_parameters=rope)
    model = LlamaForCausalLM(config)
    plain = 500.0 ** -(torch.arange(0, 32, 2) / 32)
    found = extra_tensors(model)[ROPE_FREQS]
    assert found.min() == 1.0
    assert found.max() == 8.0
    torch.testing.assert_close(plain / found, model.model.rotary_emb.inv_freq, rtol=1e-6, atol=0)


def test_names_and_sizes_are_the_gguf_packages():
    for name, kind in BLOCK_TYPES.items():
        assert gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]] == (32, kind.size)
