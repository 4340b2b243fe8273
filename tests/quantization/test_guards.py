"""What is handed to the library and cannot be quantized, or would undo quantization, is refused in words."""

import copy
import operator
import pickle
from types import SimpleNamespace

import pytest
import torch
from diffusers.hooks import apply_group_offloading, apply_layerwise_casting
from diffusers.models.attention_processor import Attention, AttnAddedKVProcessor, AttnProcessor, SlicedAttnProcessor
from torch import nn

import quest
from quest.quantization import guards
from quest.quantization.attention import QuantAttention
from quest.quantization.layers import attentions
from quest.quantization.placement import place
from quest.quantization.swapping import swap


@pytest.fixture(scope="module")
def quantized(text_pipe, text_calibration):
    recipe = dict(time_groups=3, tla_iterations=0, cma_iterations=0, samples=8)
    return quest.quantize(text_pipe, "quest-suite", "w4a8", calibration=text_calibration, **recipe)


@pytest.fixture
def pipe(quantized):
    """A copy of the quantized pipeline, on the fastest kernel."""
    new = copy.copy(quantized)
    new.unet = copy.deepcopy(quantized.unet)
    place(new.unet)
    return new


def test_prompts_need_a_text_encoder_in_float32(text_pipe, text_calibration):
    """transformers loads a text encoder as it was stored, also in half precision; diffusers does not."""
    half = copy.copy(text_pipe)
    half.text_encoder = copy.deepcopy(text_pipe.text_encoder).half()
    with pytest.raises(
        ValueError, match=r"text_encoder is in torch.float16; load the pipeline with .to\(torch.float32"
    ):
        quest.quantize(half, "rtn", "w8a8", calibration=["a red circle"])
    quest.quantize(half, "rtn", "w8a8", calibration=text_calibration)  # its prompts are sampled already


CALLS = {
    "pipe.unet.save_attn_procs": ("x",),
    "pipe.unet.save_lora_adapter": ("x",),
    "pipe.enable_attention_slicing": (),
    "pipe.unet.set_attention_slice": (1,),
    "pipe.unet.set_attn_processor": (AttnProcessor(),),
    "pipe.unet.set_default_attn_processor": (),
    "pipe.enable_xformers_memory_efficient_attention": (),
    "pipe.unet.enable_xformers_memory_efficient_attention": (),
    "pipe.fuse_qkv_projections": (),
    "pipe.unet.fuse_qkv_projections": (),
    "pipe.unet.set_attention_backend": ("native",),
    "pipe.load_lora_weights": ({},),
    "pipe.fuse_lora": (),
    "pipe.set_adapters": ("x",),
    "pipe.load_ip_adapter": ("x", "y", "z"),
    "pipe.unet.load_lora_adapter": ({},),
    "pipe.unet.fuse_lora": (),
    "pipe.unet.set_adapters": ("x",),
    "pipe.unet.add_adapter": (None,),
    "pipe.unet.load_attn_procs": ({},),
    "pipe.unet.enable_gradient_checkpointing": (),
    "pipe.unet.enable_layerwise_casting": (),
    "pipe.enable_sequential_cpu_offload": (),
    "pipe.enable_group_offload": ("cpu",),
    "pipe.unet.half": (),
    "pipe.unet.double": (),
    "pipe.unet.bfloat16": (),
    "pipe.unet.to": (torch.float16,),
    "pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn1.set_processor": (AttnProcessor(),),
    "pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn1.fuse_projections": (),
}


@pytest.mark.parametrize("call", CALLS)
def test_what_would_undo_quantization_is_refused(call, pipe, tmp_path, monkeypatch, text_calibration):
    monkeypatch.chdir(tmp_path)
    with torch.no_grad():
        before = pipe.unet(**text_calibration.inputs(torch.arange(2))).sample
        with pytest.raises(ValueError, match="quantized"):
            eval(call, {"pipe": pipe})(*CALLS[call])
        assert torch.equal(pipe.unet(**text_calibration.inputs(torch.arange(2))).sample, before)
    assert not list(tmp_path.iterdir())
    assert all(isinstance(a.processor, QuantAttention) for _, a in attentions(pipe.unet))
    quest.save(pipe, tmp_path / "x.safetensors")


@pytest.mark.parametrize("place", ["unet", "unet.mid_block", "unet.conv_in"])
@pytest.mark.parametrize(
    "hook", [dict(offload_type="leaf_level"), dict(offload_type="block_level", num_blocks_per_group=1), None]
)
def test_functions_that_move_or_cast_layers_one_by_one_are_refused(hook, place, pipe, text_calibration):
    """Whichever part they are called with; full precision and other parts of a pipeline take them."""
    inputs = text_calibration.inputs(torch.arange(2))

    def act(module):
        if hook is None:
            apply_layerwise_casting(module, storage_dtype=torch.bfloat16, compute_dtype=torch.float32)
        else:
            apply_group_offloading(module, onload_device=torch.device("cpu"), **hook)

    with torch.no_grad():
        before = pipe.unet(**inputs).sample
        with pytest.raises(ValueError, match="stays whole, on one device, in torch.float32"):
            act(operator.attrgetter(place)(pipe))
        assert torch.equal(pipe.unet(**inputs).sample, before)
    act(nn.Sequential(nn.Linear(2, 2)))


def test_what_keeps_quantization_works(pipe, text_calibration, tmp_path):
    inputs = text_calibration.inputs(torch.arange(2))
    with torch.no_grad():
        expected = pipe.unet(**inputs).sample
        assert torch.equal(pickle.loads(pickle.dumps(pipe.unet))(**inputs).sample, expected)
        assert torch.equal(copy.deepcopy(pipe.unet)(**inputs).sample, expected)
        pipe.unet.enable_freeu(s1=0.9, s2=0.2, b1=1.5, b2=1.6)
        assert not torch.equal(pipe.unet(**inputs).sample, expected)
        pipe.unet.disable_freeu()
        assert torch.equal(pipe.unet(**inputs).sample, expected)
        for block in (m for m in pipe.unet.modules() if hasattr(m, "set_chunk_feed_forward")):
            block.set_chunk_feed_forward(2, 1)
        torch.testing.assert_close(pipe.unet(**inputs).sample, expected, rtol=1e-3, atol=1e-3)
        assert torch.equal(pipe.unet.to("cpu")(**inputs).sample, pipe.unet(**inputs).sample)


@pytest.mark.parametrize("wrap", [lambda m: torch.compile(m, backend="eager"), nn.DataParallel])
def test_wrappers_are_unwrapped_or_refused(wrap, pipe, text_pipe, text_calibration, tmp_path):
    quest.save(pipe, tmp_path / "plain.safetensors")
    pipe.unet = wrap(pipe.unet)
    quest.save(pipe, tmp_path / "wrapped.safetensors")
    loaded = [quest.load(text_pipe, tmp_path / f"{name}.safetensors").unet for name in ("plain", "wrapped")]
    assert all(torch.equal(v, loaded[1].state_dict()[k]) for k, v in loaded[0].state_dict().items())
    outside = copy.copy(text_pipe)
    outside.unet = wrap(copy.deepcopy(text_pipe.unet))
    for act in (
        lambda: quest.quantize(outside, "rtn", calibration=text_calibration),
        lambda: quest.load(outside, tmp_path / "plain.safetensors"),
    ):
        with pytest.raises(ValueError, match=r"unet: a (OptimizedModule|DataParallel) is around it; set pipe\.unet"):
            act()


def _changed(pipe, change):
    new = copy.copy(pipe)
    new.unet = copy.deepcopy(pipe.unet)
    change(new.unet)
    return new


def _attention(**config):
    def put(unet):
        old = unet.mid_block.attentions[0].transformer_blocks[0].attn1
        processor = config.pop("processor", AttnProcessor())
        new = Attention(old.query_dim, heads=4, dim_head=old.query_dim // 4, **config)
        new.set_processor(processor)
        unet.mid_block.attentions[0].transformer_blocks[0].attn1 = new

    return put


def _linear_of_another_class(unet):
    old = unet.time_embedding.linear_1
    unet.time_embedding.linear_1 = torch.nn.modules.linear.NonDynamicallyQuantizableLinear(*old.weight.shape[::-1])


UNFIT = {
    "half precision": (lambda u: u.half(), "float16"),
    "one layer in half precision": (lambda u: u.conv_out.half(), r"bfloat16|float16 \(conv_out"),
    "double precision": (lambda u: u.double(), "float64"),
    "no memory": (lambda u: u.to("meta"), "lies on meta"),
    "on two devices": (lambda u: u.conv_out.to("meta"), "lies on cpu and meta"),
    "accelerate's hook": (lambda u: setattr(u.conv_in, "_hf_hook", 1), "conv_in: accelerate moves it"),
    "a layer of another class": (_linear_of_another_class, "time_embedding.linear_1: a NonDynamically"),
    "sliced attention": (lambda u: u.set_attn_processor(SlicedAttnProcessor(1)), "SlicedAttnProcessor"),
    "projections together": (lambda u: u.fuse_qkv_projections(), "FusedAttnProcessor2_0"),
    "a processor with weights": (_attention(processor=nn.Linear(1, 1)), "processor is a Linear"),
    "added keys": (
        _attention(added_kv_proj_dim=32, processor=AttnAddedKVProcessor()),
        "attn1: its attention processor is a AttnAddedKVProcessor",
    ),
    "added keys, plain processor": (_attention(added_kv_proj_dim=32), "attn1: a Attention with add_k_proj, add_v_proj"),
    "normed queries": (_attention(qk_norm="layer_norm"), "with norm_q, norm_k"),
    "a normed context": (_attention(cross_attention_norm="layer_norm"), "with norm_cross"),
    "a spatial norm": (_attention(spatial_norm_dim=4), "with spatial_norm"),
    "fewer heads of keys": (_attention(kv_heads=1), "with kv_heads"),
    "a causal mask": (_attention(is_causal=True), "with is_causal"),
    "no last layer": (_attention(pre_only=True), "with pre_only"),
    "boxes": (lambda u: u.register_to_config(attention_type="gated"), "attention_type: 'gated'"),
    "an image prompt": (lambda u: u.register_to_config(encoder_hid_dim_type="ip_image_proj"), "encoder_hid_dim_type"),
}


@pytest.mark.parametrize("kind", UNFIT)
def test_what_cannot_be_quantized_exactly_is_refused_by_name(kind, text_pipe, text_calibration, quantized, tmp_path):
    change, told = UNFIT[kind]
    unfit = _changed(text_pipe, change)
    with pytest.raises(ValueError, match=told):
        quest.quantize(unfit, "rtn", "w8a8", calibration=text_calibration)
    if kind != "no memory":  # a plan swaps the layers of models without weights
        with pytest.raises(ValueError, match=told):
            swap(unfit, 8, 8)
    quest.save(quantized, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=told):
        quest.load(unfit, tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    "config", [{}, {"residual_connection": True}, {"rescale_output_factor": 2.0}, {"upcast_attention": True}]
)
def test_what_is_allowed_is_computed_exactly(config, text_pipe, text_calibration):
    torch.manual_seed(0)
    fit = _changed(text_pipe, _attention(norm_num_groups=8, dropout=0.5, **config))
    fit.unet.eval()
    plain = copy.deepcopy(fit.unet)
    plain.set_attn_processor(AttnProcessor())
    with torch.no_grad():
        inputs = text_calibration.inputs(torch.arange(2))
        assert torch.equal(swap(fit, 32, 32, softmax_bits=32).unet(**inputs).sample, plain(**inputs).sample)


def test_a_pipeline_without_a_denoiser():
    with pytest.raises(ValueError, match="a SimpleNamespace has no unet"):
        guards.check(SimpleNamespace(vae=nn.Linear(1, 1)))


def test_what_is_no_longer_quantized_is_not_saved(pipe, tmp_path):
    attention = pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn1
    processor = attention.processor
    del attention.processor
    attention.processor = AttnProcessor()
    with pytest.raises(ValueError, match="attn1: its attention is no longer quantized"):
        quest.save(pipe, tmp_path / "x.safetensors")
    del attention.processor
    attention.processor = processor
    pipe.unet.conv_in = nn.Conv2d(4, 32, 3, padding=1)
    with pytest.raises(ValueError, match="conv_in: a Conv2d that is not quantized"):
        quest.save(pipe, tmp_path / "x.safetensors")
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_knows_its_architecture_and_schedule(quantized, text_pipe, text_calibration, tmp_path):
    quest.save(quantized, tmp_path / "x.safetensors")
    other = _changed(text_pipe, lambda u: u.register_to_config(attention_head_dim=8))
    with pytest.raises(ValueError, match=r"another model: unet.config.attention_head_dim: 4 in the file, 8 in"):
        quest.load(other, tmp_path / "x.safetensors")
    told_of = {"prediction_type epsilon, not v_pred": {"prediction_type": "v_prediction"}, "betas": {"beta_end": 0.02}}
    for told, change in told_of.items():
        other = copy.copy(text_pipe)
        other.scheduler = type(text_pipe.scheduler).from_config(text_pipe.scheduler.config, **change)
        with pytest.raises(ValueError, match=told):
            quest.load(other, tmp_path / "x.safetensors")
        with pytest.raises(ValueError, match=f"calibration: made with another schedule .*{told}"):
            quest.quantize(other, "rtn", "w8a8", calibration=text_calibration)
