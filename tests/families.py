"""Every causal language model that transformers knows, tiny and with random weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from gradmem.backbone import Backbone
from gradmem.batch import Tokens
from gradmem.generation import RowControl
from gradmem.memory import LENGTHS, Memory
from gradmem.methods import GradMem
from gradmem.prefix import Prefix

FAMILIES = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
NOT_TRIED = {
    "blt": "works on patches of bytes; there is no small one",
    "dots3_note": "there is no small one",
    "dots3_note_text": "there is no small one",
    "gemma3n": "needs the package timm",
    "gemma4_assistant": "an assistant of another model",
    "gemma4_unified_assistant": "an assistant of another model",
    "musicgen": "transformers cannot build it as a language model",
    "musicgen_melody": "transformers cannot build it as a language model",
    "qwen4_exp": "transformers' own defaults do not build",
    "qwen4_exp_text": "transformers' own defaults do not build",
}
"""Families without a small model to try, and why."""
ALWAYS = {"head_dim"}
VOCABULARY = 48
WINDOW = 6
MOST_WEIGHTS = 2**23
SIZES: dict[int, str] = {
    VOCABULARY: "vocab_size vocab_size_per_layer_input",
    WINDOW: "sliding_window window_size local_attention attention_window_size attention_chunk_size sliding_window_size",
    32: "hidden_size d_model n_embd emb_dim embedding_dim embedding_size input_embedding_size output_embedding_size "
    "word_embed_proj_dim attention_hidden_size lru_width mamba_d_ssm lru_width router_hidden_size linear_head_dim "
    "short_conv ",
    64: "intermediate_size ffn_dim decoder_ffn_dim encoder_ffn_dim dff dim_ff d_inner n_inner ffn_hidden_size "
    "moe_intermediate_size shared_expert_intermediate_size shared_experts_intermediate_size intermediate_size_mlp "
    "expert_ffn_hidden_size dense_intermediate_size shared_intermediate_size moe_shared_expert_intermediate_size",
    128: "max_position_embeddings n_positions n_ctx max_seq_len context_length model_max_length",
    2: "num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers num_decoder_layers "
    "num_key_value_heads swa_num_key_value_heads num_experts_per_tok num_experts_per_token moe_k moe_topk "
    "num_encoder_layers num_kv_heads n_groups mamba_n_groups mamba_ngroups linear_num_key_heads num_query_groups",
    4: "num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads attention_heads "
    "num_experts n_routed_experts num_local_experts moe_num_experts swa_num_attention_heads index_n_heads "
    "num_decoder_attention_heads num_encoder_attention_heads linear_num_value_heads linear_num_heads index_topk "
    "mamba_n_heads mamba_num_heads n_mamba_heads zero_expert_num num_random_blocks hc_lowrank",
    8: "head_dim v_head_dim qk_rope_head_dim qk_nope_head_dim kv_lora_rank q_lora_rank dim_head d_head "
    "linear_key_head_dim linear_value_head_dim index_head_dim swa_head_dim rotary_dim query_pre_attn_scalar "
    "hidden_size_per_layer_input laurel_rank mamba_d_state mamba_d_head mamba_head_dim ssm_state_size state_size "
    "time_step_rank kv_channels o_lora_rank adapter_rank attention_head_size gated_norm_rank",
    1: "n_group topk_group num_expert_group first_k_dense_replace depth",
    16: "image_size",
}
EXPANDED = (
    "axk1 axk2 bailing_hybrid deepseek_v3 deepseek_v32 glm4_moe_lite glm_moe_dsa kimi_linear longcat_flash "
    "minicpm3 youtu"
)
LATENT = dict.fromkeys(("num_key_value_heads", "num_attention_heads"), 4)
IMAGES = {"image_token_id": 1, "video_token_id": 2, "audio_token_id": 2}
MAMBA: dict[str, Any] = {"mamba_n_heads": 8, "mamba_d_head": 8}
ATTENTION = ("sliding_attention", "full_attention")
GRANITE: dict[str, Any] = {
    "logits_scaling": 4.0,
    "embedding_multiplier": 3.0,
    "residual_multiplier": 0.5,
    "attention_multiplier": 0.4,
}
OVERRIDES: dict[str, dict[str, Any]] = {
    **dict.fromkeys(EXPANDED.split(), LATENT),
    "bamba": MAMBA,
    "granitemoehybrid": MAMBA | GRANITE,
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {kind: {"rope_type": "default", "rope_theta": 1e4} for kind in ATTENTION},
    },
    "gemma2": {"final_logit_softcapping": 2.0},
    "granite": GRANITE,
    "granitemoe": GRANITE,
    "granitemoeshared": GRANITE,
    "granite_swa": GRANITE,
    "granitemoe_swa": GRANITE,
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "gemma3n_text": {"layer_types": ["sliding_attention", "full_attention"] * 2, "num_kv_shared_layers": 2}
    | {"num_hidden_layers": 4, "intermediate_size": 64, "activation_sparsity_pattern": [0.0] * 4},
    "deepseek_v2": LATENT | {"num_experts_per_tok": 2},
    "gemma4": IMAGES,
    "gemma4_unified": IMAGES,
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "nemotron": {"head_dim": 8, "num_key_value_heads": 2},
    "roc_bert": {"pronunciation_vocab_size": 8, "shape_vocab_size": 8},
    "reformer": {"is_decoder": True, "axial_pos_shape": [8, 16], "axial_pos_embds_dim": [16, 16]},
    "zaya": {"num_experts_per_tok": 1},
}


def tiny_config(kind: str, **fields: Any) -> PreTrainedConfig:
    """The family's own defaults, made small: two layers, or one of each type that it has."""
    made = CONFIG_MAPPING[kind]
    given = OVERRIDES.get(kind, {}) | fields
    return made(**{**_small(made(), given), **given})


def _small(default: PreTrainedConfig, given: dict[str, Any]) -> dict[str, Any]:
    """Small values for the fields of a config that have any, those of parts of the model in configs of their own."""
    known = default.to_dict()
    found = {name: size for size, names in SIZES.items() for name in names.split() if name in known}
    found = {name: size for name, size in found.items() if known[name] or name in ALWAYS}
    found |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
    depth, layers = known.get("num_hidden_layers"), 2
    if types := known.get("layer_types"):
        kinds = list(dict.fromkeys(types))
        layers = max(2, len(kinds))
        found |= {"layer_types": kinds * (2 if len(kinds) == 1 else 1), "num_hidden_layers": layers}
    for name, value in known.items():
        part = vars(default).get(name)
        if isinstance(part, PreTrainedConfig):
            found[name] = {**_small(part, {}), **given.get(name, {})}
        elif isinstance(value, list) and depth and len(value) == depth and name not in found:
            found[name] = value[:layers]
    return found


def tiny_model(kind: str, **fields: Any) -> PreTrainedModel:
    """Random weights, large enough for every part to matter."""
    config = tiny_config(kind, **fields)
    with torch.device("meta"):
        count = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    assert count <= MOST_WEIGHTS, f"{kind} has {count:,} weights"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim >= 2:
                    parameter.normal_(std=0.2)
    return model.float().eval()


def made(kind: str, **fields: Any) -> GradMem:
    """The method on a family, if it is accepted.

    Raises
    ------
    GradmemError
        When it is refused.
    """
    return GradMem(
        Backbone(tiny_model(kind, **fields)), n_mem=3, write_steps=1, chunk_size=4, chunk_mode="independent"
    ).eval()


class Told(RowControl):
    """What was told of each query while it was answered."""

    def __init__(self, queries: int) -> None:
        self.ids: list[list[int]] = [[] for _ in range(queries)]

    def begin(self, rows: list[int]) -> None:
        self.rows = rows

    def choose(self, ids: Tensor, scores: Tensor) -> Tensor:
        return scores

    def ended(self, ids: Tensor, scores: Any, **_: Any) -> Tensor:
        for row, token in zip(self.rows, ids[:, -1].tolist(), strict=True):
            self.ids[row].append(token)
        return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)


@torch.no_grad()
def check(method: GradMem) -> None:
    """READ alone, in uneven batches, joined, generated and streamed, against whole passes without a cache."""
    backbone, generator = method.backbone, torch.Generator().manual_seed(1)
    scale = backbone.model.get_input_embeddings().weight.std()
    vectors = torch.randn(3, 2, 3, backbone.width, generator=generator) * scale
    counts = torch.tensor([2, 1, 2])
    vectors[1, 1:] = 0
    memory = Memory({"memory": vectors, LENGTHS: counts})
    lengths = [9, 2, 4]
    queries = [torch.randint(3, VOCABULARY, (length,), generator=generator).tolist() for length in lengths]
    own = [vectors[row, :count].flatten(0, 1) for row, count in enumerate(counts)]
    one = [method.prefix(memory.select([row])) for row in range(3)]

    def whole(row: int, ids: list[int]) -> Tensor:
        """The model's own logits of a query after its memory."""
        embeds = torch.cat([own[row], backbone.embed(torch.tensor(ids))])[None]
        logits: Tensor = backbone.model(inputs_embeds=embeds, use_cache=False).logits[0]
        return logits[len(own[row]) :]

    wanted = [whole(row, query) for row, query in enumerate(queries)]
    largest = max(float(logits.abs().max()) for logits in wanted)

    def same(found: Tensor, logits: Tensor, what: str) -> None:
        error = float((found - logits).abs().max())
        assert error <= 1e-3 * largest, f"{what}: {error:.2g} of {largest:.2g}"

    def reads(prefix: Prefix, rows: list[int], what: str) -> None:
        hidden = method.read_hidden(prefix, Tokens.from_lists([queries[row] for row in rows]))
        for place, row in enumerate(rows):
            same(backbone.head(hidden[place, 1 : lengths[row] + 1]), wanted[row], what)

    embeds = torch.cat([own[0], backbone.embed(torch.tensor(queries[0]))])[None]
    with backbone.double_backward():
        same(backbone.head(backbone.hidden(embeds))[0, len(own[0]) :], wanted[0], "as WRITE computes")
    for row in range(3):
        reads(one[row].select(torch.tensor([0])), [row], "alone")
    reads(method.prefix(memory), [0, 1, 2], "in a batch")
    # In some families the first tokens stand for images.
    settings: dict[str, Any] = {"max_new_tokens": 4, "suppress_tokens": [0, 1, 2]}
    alone = [method.generate(one[row], [queries[row]], **settings)[0] for row in range(3)]
    for row, answer in enumerate(alone):
        logits = whole(row, queries[row] + answer)[lengths[row] - 1 : -1]
        for step, token in zip(logits, answer, strict=True):
            assert float(step[3:].max() - step[token]) <= 1e-3 * largest, "generated"
    assert method.generate(memory, queries, **settings) == alone, "generated in a batch"
    for order in ([0, 1, 2], [1, 2, 0]):
        joined = one[order[0]].join([one[row] for row in order[1:]])
        told = Told(3)
        reads(joined.select(torch.arange(3)), order, "joined")
        found = method.generate(joined, [queries[row] for row in order], control=told, **settings)
        assert found == [alone[row] for row in order], "generated after joined prefixes"
