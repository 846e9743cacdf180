"""Configuration of MiniMoE, a BERT encoder whose layers hold several experts of which one is active per token."""

from transformers import PretrainedConfig


class MiniMoEConfig(PretrainedConfig):
    """Sizes of a MiniMoE encoder (arXiv 2305.12129). The names are BERT's; two fields count the experts.

    With `selection_bias` every router adds a bias to its scores when it chooses (arXiv 2408.15664).
    """

    model_type = "minimoe"

    def __init__(
        self,
        vocab_size=30522,
        hidden_size=384,
        num_hidden_layers=3,
        num_attention_heads=12,
        intermediate_size=1536,
        num_experts=4,
        num_attention_experts=1,
        selection_bias=False,
        hidden_dropout_prob=0.1,
        attention_probs_dropout_prob=0.1,
        max_position_embeddings=512,
        type_vocab_size=2,
        initializer_range=0.02,
        layer_norm_eps=1e-12,
        pad_token_id=0,
        classifier_dropout=None,
        **kwargs,
    ):
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.intermediate_size = intermediate_size
        self.num_experts = num_experts
        self.num_attention_experts = num_attention_experts
        self.selection_bias = selection_bias
        self.hidden_dropout_prob = hidden_dropout_prob
        self.attention_probs_dropout_prob = attention_probs_dropout_prob
        self.max_position_embeddings = max_position_embeddings
        self.type_vocab_size = type_vocab_size
        self.initializer_range = initializer_range
        self.layer_norm_eps = layer_norm_eps
        self.classifier_dropout = classifier_dropout
        super().__init__(pad_token_id=pad_token_id, **kwargs)
