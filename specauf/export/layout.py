"""The contract with the servers: which tensors a drafter's checkpoint holds, by name and shape.

Read from z-lab/dflash 0.1.0, speculators 0.9.0, vLLM, SGLang and llama.cpp; see `docs/serving.md`.
"""

from specauf.drafters import DFlash2Config, DominoConfig, DrafterConfig, DSparkConfig

Shapes = dict[str, tuple[int, ...]]


def body_shapes(config: DrafterConfig) -> Shapes:
    """The tensors that z-lab's layout holds, and no others: 11 a layer and 3, and those that other kinds add.

    `fc` reads the taps in the order of their list, each tap's channels together.
    """
    hidden, inner, head = config.hidden_size, config.intermediate_size, config.head_dim
    query, key = config.num_attention_heads * head, config.num_key_value_heads * head
    shapes: Shapes = {
        "fc.weight": (hidden, config.raw_feature_dim),
        "hidden_norm.weight": (hidden,),
        "norm.weight": (hidden,),
    }
    for i in range(config.num_hidden_layers):
        layer: Shapes = {
            "input_layernorm": (hidden,),
            "post_attention_layernorm": (hidden,),
            "self_attn.q_proj": (query, hidden),
            "self_attn.k_proj": (key, hidden),
            "self_attn.v_proj": (key, hidden),
            "self_attn.o_proj": (hidden, query),
            "self_attn.q_norm": (head,),
            "self_attn.k_norm": (head,),
            "mlp.gate_proj": (inner, hidden),
            "mlp.up_proj": (inner, hidden),
            "mlp.down_proj": (hidden, inner),
        }
        shapes |= {f"layers.{i}.{name}.weight": shape for name, shape in layer.items()}
    if isinstance(config, DFlash2Config):
        rank, taps = config.selector_rank, config.conv_kernel_size
        shapes |= {
            "candidate_selector.predecessor_codebook": (config.vocab_size, rank),
            "candidate_selector.successor_codebook": (config.vocab_size, rank),
            "candidate_selector.hidden_projection.weight": (rank, hidden),
        }
        for i in range(config.num_hidden_layers):
            for name in (f"layers.{i}.attention_conv", f"layers.{i}.mlp_conv"):
                shapes[f"{name}.base_kernel"] = (2, taps, hidden)
                shapes[f"{name}.kernel_projection.weight"] = (2 * taps * hidden // config.conv_group_size, hidden)
    if isinstance(config, DSparkConfig):
        rank = config.markov_rank
        shapes |= {f"markov_head.markov_{name}.weight": (config.vocab_size, rank) for name in ("w1", "w2")}
        if config.markov_head_type == "gated":
            shapes |= {
                "markov_head.gate_proj.weight": (rank, hidden + rank),
                "markov_head.gate_proj.bias": (rank,),
            }
        if config.markov_head_type == "rnn":
            shapes |= {
                "markov_head.joint_proj.weight": (3 * rank, 2 * rank + hidden),
                "markov_head.joint_proj.bias": (3 * rank,),
            }
        if config.enable_confidence_head:
            shapes |= {"confidence_head.proj.weight": (1, hidden + rank), "confidence_head.proj.bias": (1,)}
    if isinstance(config, DominoConfig):
        state, rank = config.gru_hidden_dim, config.emb_dim
        shapes |= {
            "prefix_gru.weight_ih_l0": (3 * state, hidden),
            "prefix_gru.weight_hh_l0": (3 * state, state),
            "embed_proj.0.weight": (rank, hidden + state),
            "embed_proj.2.weight": (config.vocab_size, rank),
        }
    return shapes


def speculators_shapes(config: DrafterConfig, draft_vocab_size: int) -> Shapes:
    """The tensors of speculators' layout: body, verifier's embedding and head, tables of a reduced head.

    `d2t` holds offsets: draft id i is target id i + d2t[i].
    """
    vocabulary, hidden = config.vocab_size, config.hidden_size
    own: Shapes = {"embed_tokens.weight": (vocabulary, hidden), "lm_head.weight": (draft_vocab_size, hidden)}
    if draft_vocab_size != vocabulary:
        own |= {"t2d": (vocabulary,), "d2t": (draft_vocab_size,)}
        if isinstance(config, DSparkConfig):
            own |= {"markov_head.markov_w2.weight": (draft_vocab_size, config.markov_rank)}
    return body_shapes(config) | own
