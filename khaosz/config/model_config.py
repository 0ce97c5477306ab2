"""`ModelConfig`: the shape of the network, in the field names of Hugging Face's config.json."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from khaosz.config.closed import Closed

# Of layers with `linear_attention`, a gated DeltaNet (khaosz/model/delta_net.py).
DELTA_NET = (
    "linear_num_key_heads",
    "linear_num_value_heads",
    "linear_key_head_dim",
    "linear_value_head_dim",
    "linear_conv_kernel_dim",
)
# Of layers with experts (khaosz/model/mixture.py).
EXPERTS = ("num_experts", "num_experts_per_tok", "moe_intermediate_size")
_MOST_EXPERTS = 100_000  # of all layers: twice as many as the largest models have
# What model families differ in.
FEATURES = (
    "qk_norm",
    "qkv_bias",
    "qk_norm_after_rotary",
    "output_norms",
    "hidden_act",
    "embedding_multiplier",
    "attention_multiplier",
    "residual_multiplier",
    "logits_scaling",
    "rope_interleaved",
    "partial_rotary_factor",
    "rope_local_theta",
    "no_rope_layers",
    "query_scaling",
    "layer_types",
    "attn_output_gate",
    *DELTA_NET,
    "bidirectional",
    "conv_L_cache",
    "global_head_dim",
    "value_norm",
    "num_kv_shared_layers",
    "use_double_wide_mlp",
    "hidden_size_per_layer_input",
    "layer_scalar",
    "final_logit_softcapping",
    *EXPERTS,
    "norm_topk_prob",
    "mlp_only_layers",
    "router_aux_loss_coef",
)


class RopeScaling(Closed):
    """Scaling of the rotary frequencies beyond the trained context.

    `linear`: positions divided by `factor` (Chen et al. 2023, arXiv:2306.15595). `llama3`: low
    frequencies divided, high ones unchanged, a ramp between (Llama 3.1). `yarn`: the NTK-by-parts
    ramp and an attention temperature (Peng et al. 2023, arXiv:2309.00071). `longrope`: a factor
    for each frequency, those of `long_factor` in sequences beyond the original context, those of
    `short_factor` in others (Ding et al. 2024, arXiv:2402.13753). `proportional`: of the pairs of a
    head the first `proportion` rotates, each as it would in a whole rotation (Gemma 4).
    """

    rope_type: Literal["linear", "llama3", "yarn", "longrope", "proportional"]
    factor: float = Field(ge=1.0, le=1e6)
    original_max_position_embeddings: int | None = Field(default=None, ge=1, le=2**31)
    low_freq_factor: float = Field(default=1.0, gt=0, le=1e6)
    high_freq_factor: float = Field(default=4.0, gt=0, le=1e6)
    beta_fast: float = Field(default=32.0, gt=0, le=1e6)
    beta_slow: float = Field(default=1.0, gt=0, le=1e6)
    attention_factor: float | None = Field(default=None, gt=0, le=1e6)
    truncate: bool = True
    short_factor: tuple[float, ...] | None = None
    long_factor: tuple[float, ...] | None = None
    proportion: float = Field(default=1.0, gt=0, le=1)

    @model_validator(mode="after")
    def _needs_original(self) -> RopeScaling:
        if self.rope_type in ("llama3", "longrope") and not self.original_max_position_embeddings:
            raise ValueError(f"{self.rope_type} scaling requires original_max_position_embeddings")
        if self.rope_type == "longrope" and not (self.short_factor and self.long_factor):
            raise ValueError("longrope scaling requires short_factor and long_factor")
        if any(not 0 < f < 1e6 for f in (*(self.short_factor or ()), *(self.long_factor or ()))):
            raise ValueError("the factors of longrope scaling must be above 0 and below 1e6")
        if self.rope_type == "llama3" and self.high_freq_factor <= self.low_freq_factor:
            raise ValueError("high_freq_factor must be above low_freq_factor")
        return self


LayerType = Literal["full_attention", "sliding_attention", "linear_attention", "conv"]


class ModelConfig(Closed):
    """A decoder-only Transformer: RMSNorm, RoPE, grouped-query attention, SwiGLU.

    Families of models differ in their `features`, each described where the network computes it
    (`khaosz/model`); the families' own names stand with the formats that use them, in
    `khaosz.interop`. `layer_types` are of one layer each; no list means full attention everywhere.
    """

    vocab_size: int = Field(ge=1, le=2**31)
    hidden_size: int = Field(ge=2, le=2**31)
    intermediate_size: int = Field(ge=1, le=2**31)
    num_hidden_layers: int = Field(ge=1, le=2**31)
    num_attention_heads: int = Field(ge=1, le=2**31)
    num_key_value_heads: int = Field(ge=1, le=2**31)
    head_dim: int = Field(ge=2, le=2**31)
    max_position_embeddings: int = Field(default=2048, ge=1, le=2**31)
    rms_norm_eps: float = Field(default=1e-6, gt=0, le=1)
    rope_theta: float = Field(default=10_000.0, gt=0, le=1e15)
    rope_scaling: RopeScaling | None = None
    tie_word_embeddings: bool = True
    qk_norm: bool = False
    qkv_bias: bool = False
    qk_norm_after_rotary: bool = False
    output_norms: bool = False
    hidden_act: Literal["silu", "gelu_pytorch_tanh"] = "silu"
    embedding_multiplier: float = Field(default=1.0, gt=0, le=1e6)
    attention_multiplier: float | None = Field(default=None, gt=0, le=1e6)
    residual_multiplier: float = Field(default=1.0, gt=0, le=1e6)
    logits_scaling: float = Field(default=1.0, gt=0, le=1e6)
    rope_interleaved: bool = False
    partial_rotary_factor: float = Field(default=1.0, gt=0, le=1)
    rope_local_theta: float | None = Field(default=None, gt=0, le=1e15)
    no_rope_layers: tuple[Literal[0, 1], ...] | None = None
    query_scaling: float = Field(default=0.0, ge=0, le=1e6)
    layer_types: tuple[LayerType, ...] | None = None
    sliding_window: int | None = Field(default=None, ge=1, le=2**31)
    attn_output_gate: bool = False
    linear_num_key_heads: int | None = Field(default=None, ge=1, le=2**31)
    linear_num_value_heads: int | None = Field(default=None, ge=1, le=2**31)
    linear_key_head_dim: int | None = Field(default=None, ge=1, le=2**31)
    linear_value_head_dim: int | None = Field(default=None, ge=1, le=2**31)
    linear_conv_kernel_dim: int | None = Field(default=None, ge=2, le=2**31)
    bidirectional: bool = False
    conv_L_cache: int | None = Field(default=None, ge=2, le=2**31)
    global_head_dim: int | None = Field(default=None, ge=2, le=2**31)
    value_norm: bool = False
    num_kv_shared_layers: int = Field(default=0, ge=0, le=2**31)
    use_double_wide_mlp: bool = False
    hidden_size_per_layer_input: int = Field(default=0, ge=0, le=2**31)
    layer_scalar: bool = False
    final_logit_softcapping: float | None = Field(default=None, gt=0, le=1e6)
    num_experts: int | None = Field(default=None, ge=1, le=4096)
    num_experts_per_tok: int | None = Field(default=None, ge=1, le=4096)
    moe_intermediate_size: int | None = Field(default=None, ge=1, le=2**31)
    norm_topk_prob: bool = False
    mlp_only_layers: tuple[int, ...] | None = None
    router_aux_loss_coef: float = Field(default=0.001, ge=0, le=1e6)
    initializer_range: float = Field(default=0.02, gt=0, le=100)

    @model_validator(mode="after")
    def _consistent(self) -> ModelConfig:
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads ({self.num_attention_heads}) must be a multiple of "
                f"num_key_value_heads ({self.num_key_value_heads})"
            )
        for width in (self.head_dim, self.widest_head):
            if width % 2:
                raise ValueError(f"head_dim must be even for rotary positions (got {width})")
        if self.qk_norm and self.qkv_bias:
            raise ValueError("qk_norm and qkv_bias exclude each other: no model family has both")
        if self.qk_norm_after_rotary and not self.qk_norm:
            raise ValueError("qk_norm_after_rotary requires qk_norm")
        if self.rotary_dim < 2 or self.rotary_dim % 2:
            raise ValueError(
                f"head_dim * partial_rotary_factor must be even (got {self.rotary_dim})"
            )
        for name in ("layer_types", "no_rope_layers"):
            each = getattr(self, name)
            if each is not None and len(each) != self.num_hidden_layers:
                raise ValueError(
                    f"{name} has {len(each)} entries for {self.num_hidden_layers} layers"
                )
        if ("sliding_attention" in (self.layer_types or ())) != (self.sliding_window is not None):
            raise ValueError(
                "sliding_window and layer_types with sliding_attention require each other"
            )
        linear = "linear_attention" in (self.layer_types or ())
        if any((getattr(self, name) is not None) != linear for name in DELTA_NET):
            raise ValueError(f"linear_attention in layer_types requires {', '.join(DELTA_NET)}")
        if ("conv" in (self.layer_types or ())) != (self.conv_L_cache is not None):
            raise ValueError("conv_L_cache and layer_types with conv require each other")
        if (self.linear_num_value_heads or 0) % (self.linear_num_key_heads or 1):
            raise ValueError("linear_num_value_heads must be a multiple of linear_num_key_heads")
        if self.global_head_dim is not None and self.rope_local_theta is None:
            raise ValueError("global_head_dim requires rope_local_theta")
        self._check_sharing()
        self._check_experts()
        scaling = self.rope_scaling
        for name in ("short_factor", "long_factor"):
            factors = scaling and getattr(scaling, name)
            if factors and len(factors) != self.rotary_dim // 2:
                raise ValueError(
                    f"{name} has {len(factors)} factors for {self.rotary_dim // 2} frequencies"
                )
        original = scaling.original_max_position_embeddings if scaling is not None else None
        if self.query_scaling and original is None:
            raise ValueError(
                "query_scaling requires rope_scaling with original_max_position_embeddings"
            )
        return self

    def _check_sharing(self) -> None:
        own = self.num_hidden_layers - self.num_kv_shared_layers
        types = self.layer_types or ("full_attention",) * self.num_hidden_layers
        if own < 1 or set(types[own:]) - set(types[:own]):
            raise ValueError(
                f"num_kv_shared_layers is {self.num_kv_shared_layers} of {self.num_hidden_layers}:"
                " each needs an earlier layer of its type with keys and values of its own"
            )
        if self.use_double_wide_mlp and not self.num_kv_shared_layers:
            raise ValueError("use_double_wide_mlp requires num_kv_shared_layers")

    def _check_experts(self) -> None:
        """Raises ValueError."""
        experts = self.num_experts
        if any((getattr(self, name) is None) != (experts is None) for name in EXPERTS):
            raise ValueError(f"{', '.join(EXPERTS)} require each other")
        if experts is None:
            fields = type(self).model_fields
            for name in ("norm_topk_prob", "mlp_only_layers", "router_aux_loss_coef"):
                if getattr(self, name) != fields[name].default:
                    raise ValueError(f"{name} requires num_experts")
            return
        if experts * self.num_hidden_layers > _MOST_EXPERTS:  # before their names are listed
            raise ValueError(f"{experts} experts in {self.num_hidden_layers} layers are too many")
        if (self.num_experts_per_tok or 0) > experts:
            raise ValueError(
                f"num_experts_per_tok ({self.num_experts_per_tok}) is above num_experts ({experts})"
            )
        if self.num_kv_shared_layers or self.use_double_wide_mlp:
            raise ValueError("no model family has num_experts and num_kv_shared_layers")
        layers = self.mlp_only_layers or ()
        if list(layers) != sorted(set(layers)) or any(
            not 0 <= layer < self.num_hidden_layers for layer in layers
        ):
            raise ValueError(
                f"mlp_only_layers must be ascending numbers of the {self.num_hidden_layers} layers"
            )

    @property
    def widest_head(self) -> int:
        """The head width of layers that see everything, whose rotation has `rope_theta`."""
        return self.global_head_dim or self.head_dim

    @property
    def rotary_dim(self) -> int:
        """Elements of a head that are rotated, in layers that see everything."""
        return int(self.widest_head * self.partial_rotary_factor)

    @property
    def cache_shapes(self) -> list[tuple[int, int]]:
        """Key/value heads and their width, of what each layer keeps of a position."""
        heads, layers = self.num_key_value_heads, range(self.num_hidden_layers)
        stored = [self.kv_layer(i) == i and not self.state_shapes(i) for i in layers]
        return [(heads, self.head_width(i)) if stored[i] else (0, 0) for i in layers]

    def layer_type(self, layer: int) -> LayerType:
        return "full_attention" if self.layer_types is None else self.layer_types[layer]

    def state_shapes(self, layer: int) -> tuple[tuple[int, ...], ...]:
        """Of what a layer keeps of all positions together, in fp32: inputs of the convolution, and
        a matrix for each value head."""
        if self.layer_type(layer) == "conv":
            return (((self.conv_L_cache or 0) - 1, self.hidden_size),)
        if self.layer_type(layer) != "linear_attention":
            return ()
        keys, values, key_width, value_width, kernel = (getattr(self, n) for n in DELTA_NET)
        channels = 2 * keys * key_width + values * value_width
        return (kernel - 1, channels), (values, key_width, value_width)

    @property
    def all_state_shapes(self) -> list[tuple[tuple[int, ...], ...]]:
        """`state_shapes` of each layer."""
        return [self.state_shapes(layer) for layer in range(self.num_hidden_layers)]

    def head_width(self, layer: int) -> int:
        """The head width of a layer."""
        return self.widest_head if self.window(layer) is None else self.head_dim

    def kv_layer(self, layer: int) -> int:
        """The layer whose keys and values a layer reads: its own or, of the last
        `num_kv_shared_layers`, the last one before them with the same type."""
        own = self.num_hidden_layers - self.num_kv_shared_layers
        kind = self.layer_type(layer)
        return max(i for i in range(own) if self.layer_type(i) == kind) if layer >= own else layer

    def has_experts(self, layer: int) -> bool:
        """Whether the feed-forward of a layer is a mixture of experts."""
        return self.num_experts is not None and layer not in (self.mlp_only_layers or ())

    def feed_forward_width(self, layer: int) -> int:
        """F of a layer, of one expert where it has some: with `use_double_wide_mlp` it doubles
        where keys and values are shared."""
        if self.moe_intermediate_size is not None and self.has_experts(layer):
            return self.moe_intermediate_size
        double = self.use_double_wide_mlp and self.kv_layer(layer) != layer
        return self.intermediate_size * (2 if double else 1)

    def window(self, layer: int) -> int | None:
        """Positions that a layer sees, its own included; None for all. A bidirectional one sees as
        many behind its own as before it."""
        return self.sliding_window if self.layer_type(layer) == "sliding_attention" else None

    def rotary_kind(self, layer: int) -> int | None:
        """Which of the model's rotations a layer uses, None for none: 0 has `rope_theta` and
        `rope_scaling`, 1 the `rope_local_theta` of layers that see a window."""
        if self.no_rope_layers is not None and not self.no_rope_layers[layer]:
            return None
        return int(self.rope_local_theta is not None and self.window(layer) is not None)

    @property
    def features(self) -> frozenset[str]:
        """What this network has and Llama's has not: `FEATURES` that are not at their default, and
        the rotation that not every family can have."""
        fields = type(self).model_fields
        own = {n for n in FEATURES if getattr(self, n) != fields[n].default}
        kind = self.rope_scaling.rope_type if self.rope_scaling is not None else ""
        return frozenset(own | ({kind} & {"longrope", "proportional"}))

    @property
    def rope_border(self) -> int | None:
        """Positions beyond which a sequence as a whole is rotated otherwise (longrope)."""
        scaling = self.rope_scaling
        if scaling is None or scaling.rope_type != "longrope":
            return None
        return scaling.original_max_position_embeddings

    def block_parameters(self, layer: int = 0, *, active: bool = False) -> int:
        """Parameters of one layer, exactly; with `active` those that a token is computed with."""
        width, each = self.hidden_size, self.hidden_size_per_layer_input
        norms = (4 if self.output_norms else 2) * width
        extra = 2 * width * each + (width if each else 0) + int(self.layer_scalar)
        inner = self.feed_forward_width(layer)
        if self.num_experts is not None and self.has_experts(layer):
            inner *= (self.num_experts_per_tok or 0) if active else self.num_experts
            extra += width * self.num_experts
        return self._mixer_parameters(layer) + 3 * width * inner + norms + extra

    def _mixer_parameters(self, layer: int) -> int:
        width, head = self.hidden_size, self.head_width(layer)
        if self.layer_type(layer) == "conv":
            return width * (4 * width + (self.conv_L_cache or 0))
        if shapes := self.state_shapes(layer):
            (past, channels), (heads, _, values) = shapes
            vectors = channels * (past + 1) + 2 * heads + values
            return width * (channels + 2 * heads * values + 2 * heads) + vectors
        shared = self.kv_layer(layer) != layer
        queries = self.num_attention_heads * head
        keys = 0 if shared else self.num_key_value_heads * head
        gate = queries if self.attn_output_gate else 0
        bias = (queries + gate + 2 * keys) if self.qkv_bias else 0
        norms = (1 if shared else 2) * head if self.qk_norm else 0
        return width * (2 * queries + gate + 2 * keys) + bias + norms

    def embedding_parameters(self) -> int:
        """Those of the embeddings, the per-layer one with its projection and norm included."""
        width, each = self.hidden_size, self.hidden_size_per_layer_input
        tables = self.vocab_size * width * (1 if self.tie_word_embeddings else 2)
        return tables + self.num_hidden_layers * each * (self.vocab_size + width) + each

    def parameters(self) -> int:
        """All parameters, exactly: `sum(p.numel())` of the network."""
        return self.embedding_parameters() + self._blocks_parameters() + self.hidden_size

    def active_parameters(self) -> int:
        """Those that a token is computed with: of experts the chosen ones."""
        return self.embedding_parameters() + self._blocks_parameters(True) + self.hidden_size

    def _blocks_parameters(self, active: bool = False) -> int:
        layers = range(self.num_hidden_layers)
        return sum(self.block_parameters(layer, active=active) for layer in layers)

    def flops_per_token(self, context: int) -> float:
        """Training FLOPs per token, forward and backward: 6 per weight in a matrix product, and
        12 * layers * query width * context / 2 for causal attention (Chowdhery et al. 2022,
        arXiv:2204.02311, appendix B)."""
        layers = range(self.num_hidden_layers)
        matrices = self._blocks_parameters(active=True) + self.vocab_size * self.hidden_size
        matrices += len(layers) * self.hidden_size_per_layer_input * self.hidden_size
        widths = [self.head_width(layer) for layer in layers if not self.state_shapes(layer)]
        queries = self.num_attention_heads * sum(widths)
        return 6.0 * matrices + 6.0 * queries * context
