"""Wonder3D's UNet: Stable Diffusion's, whose transformer blocks also look at other views and at the other domain."""

from collections.abc import Mapping
from typing import Any

import torch
from diffusers.models.attention import Attention, BasicTransformerBlock
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import Tensor

# Setting of this class -> what older configs call it.
_SETTINGS = {
    "num_views": None,
    "multiview_attention": None,
    "sparse_mv_attention": None,
    "cd_attention_mid": "joint_attention_twice",
    "cd_attention_last": "joint_attention",
    "mvcd_attention": "cross_domain_attention",
}
_UNSUPPORTED = ("cd_attention_last", "mvcd_attention", "only_cross_attention", "dual_cross_attention")


class MultiViewTransformerBlock(BasicTransformerBlock):
    """Attention over views, over domains, over the image token, then the feed-forward layer; each with a residual.

    Rows are in the order (domain, object, view); each holds T tokens of width C: (2 * B * V, T, C).
    """

    num_views: int
    multiview: bool
    sparse: bool
    attn_joint_mid: Any
    norm_joint_mid: Any
    attn1: Any
    attn2: Any

    @classmethod
    def extend(cls, stock: BasicTransformerBlock, num_views: int, multiview: bool, sparse: bool, joint: bool) -> None:
        """Turn a stock block into one of this class, in place: the UNet's constructor leaves no choice of block."""
        block: Any = stock
        block.__class__ = cls
        block.num_views, block.multiview, block.sparse = num_views, multiview, sparse
        block.attn_joint_mid = None
        if joint:
            block.attn_joint_mid = Attention(
                query_dim=block.dim,
                heads=block.num_attention_heads,
                dim_head=block.attention_head_dim,
                dropout=block.dropout,
                bias=block.attention_bias,
                upcast_attention=block.attn1.upcast_attention,
            )
            # A block without training in two domains leaves them alone, as the original starts.
            torch.nn.init.zeros_(block.attn_joint_mid.to_out[0].weight)
            block.norm_joint_mid = torch.nn.LayerNorm(block.dim)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        timestep: Tensor | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        class_labels: Tensor | None = None,
        added_cond_kwargs: dict[str, Tensor] | None = None,
    ) -> Tensor:
        """(2 * B * V, T, C) -> the same; arguments as in the stock block. The last three have no use here."""
        kwargs = cross_attention_kwargs or {}
        hidden_states = hidden_states + self._across_views(self.norm1(hidden_states), kwargs)
        if self.attn_joint_mid is not None:
            hidden_states = hidden_states + self._across_domains(self.norm_joint_mid(hidden_states))
        hidden_states = hidden_states + self.attn2(
            self.norm2(hidden_states), encoder_hidden_states, encoder_attention_mask, **kwargs
        )
        return hidden_states + self.ff(self.norm3(hidden_states))

    def _across_views(self, tokens: Tensor, kwargs: dict[str, Any]) -> Tensor:
        """Every view of one object and domain sees the tokens of all of them, or (sparse) the front's and its own."""
        if not self.multiview:
            return self.attn1(tokens, **kwargs)
        rows, length, width = tokens.shape
        if self.sparse:
            front = tokens.view(-1, self.num_views, length, width)[:, :1].expand(-1, self.num_views, -1, -1)
            seen = torch.cat([front.reshape(rows, length, width), tokens], dim=1)
            return self.attn1(tokens, encoder_hidden_states=seen, **kwargs)
        together = tokens.reshape(-1, self.num_views * length, width)
        return self.attn1(together, **kwargs).reshape(rows, length, width)

    def _across_domains(self, tokens: Tensor) -> Tensor:
        """The normal and the colour version of the same view see each other's tokens."""
        rows, length, width = tokens.shape
        pairs = tokens.reshape(2, -1, length, width).transpose(0, 1).reshape(-1, 2 * length, width)
        pairs = self.attn_joint_mid(pairs).reshape(-1, 2, length, width)
        return pairs.transpose(0, 1).reshape(rows, length, width)


class UNetMV2DConditionModel(UNet2DConditionModel):
    """SD 1.5's UNet with attention over views and domains (Wonder3D, arXiv 2310.15008); loads the released weights.

    Rows of a batch are in the order (domain, object, view): the normal maps of all objects, then their colour views.
    Whatever else is batched, guidance too, goes where the objects are, so that the domains stay the outer axis.

    Args:
        num_views: V, views of an object.
        multiview_attention: whether self-attention spans the views of an object and domain.
        sparse_mv_attention: whether a view then sees the front view's tokens and its own only.
        cd_attention_mid: whether every block joins the two domains (all released weights do).
        stock: everything else as in `UNet2DConditionModel`; the original's block names are understood.

    Raises:
        ValueError: for settings of the original that none of its released weights uses.
    """

    _no_split_modules = ["MultiViewTransformerBlock", "ResnetBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"]  # noqa: RUF012
    _repeated_blocks = ["MultiViewTransformerBlock"]  # noqa: RUF012
    config: Any

    def __init__(
        self,
        num_views: int = 6,
        multiview_attention: bool = True,
        sparse_mv_attention: bool = False,
        cd_attention_mid: bool = True,
        **stock: Any,
    ) -> None:
        wanted = [name for name in _UNSUPPORTED if stock.get(name)]
        if wanted:
            raise ValueError(
                f"{', '.join(f'`{name}`' for name in wanted)} is set; expected false, as in released weights."
            )
        for name in ("cd_attention_last", "mvcd_attention"):
            stock.pop(name, None)
        for name in ("down_block_types", "mid_block_type", "up_block_types"):
            if stock.get(name):
                stock[name] = _stock_name(stock[name])
        super().__init__(**stock)
        self.register_to_config(
            num_views=num_views,
            multiview_attention=multiview_attention,
            sparse_mv_attention=sparse_mv_attention,
            cd_attention_mid=cd_attention_mid,
        )
        for block in [module for module in self.modules() if isinstance(module, BasicTransformerBlock)]:
            MultiViewTransformerBlock.extend(
                block, num_views, multiview_attention, sparse_mv_attention, cd_attention_mid
            )

    @classmethod
    def extract_init_dict(cls, config_dict: Mapping[str, Any], **kwargs: Any) -> tuple[dict, dict, dict]:
        """Settings of this class, under their present or older names, beside those of the stock UNet."""
        config = dict(config_dict)
        own = {}
        for name, older in _SETTINGS.items():
            stale = config.pop(older, None) if older else None
            if (value := kwargs.pop(name, config.pop(name, stale))) is not None:
                own[name] = value
        settings, unused, hidden = UNet2DConditionModel.extract_init_dict(config, **kwargs)
        return {**settings, **own}, unused, hidden

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:
        """As in diffusers, but strict: every weight must be in the file, and nothing else; safetensors only.

        Raises ValueError for missing, unknown or misshapen weights, OSError where there is no safetensors file.
        """
        with_info = kwargs.pop("output_loading_info", False)
        kwargs = {"use_safetensors": True, **kwargs}
        loaded: Any = super().from_pretrained(pretrained_model_name_or_path, output_loading_info=True, **kwargs)
        model, info = loaded
        problems = {what: info.get(f"{what}_keys") for what in ("missing", "unexpected", "mismatched")}
        found = [f"{len(keys)} {what}, e.g. {sorted(map(str, keys))[0]}" for what, keys in problems.items() if keys]
        if found:
            raise ValueError(
                f"The weights in {pretrained_model_name_or_path} are not those of this UNet: {'; '.join(found)}. "
                "Expected a Wonder3D UNet, whose config.json fits its weights."
            )
        return (model, info) if with_info else model

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As in torch; `_joint_twice`, which some released files say for `_joint_mid`, is understood."""
        return super().load_state_dict(_current_keys(state_dict), strict=strict, assign=assign)

    def _fix_state_dict_keys_on_load(self, state_dict: dict[str, Any]) -> None:
        renamed = _current_keys(state_dict)
        state_dict.clear()
        state_dict.update(renamed)

    def forward(self, sample: Tensor, timestep: Any, encoder_hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """sample (2 * B * V, 8, H, W): noisy latent first, image latent second -> (2 * B * V, 4, H, W).

        `encoder_hidden_states` (2 * B * V, 1, 768), `class_labels` (2 * B * V, 10): see `camera_embeddings`. Raises
        ValueError for a number of rows that is no multiple of both domains' views.
        """
        group = self.config.num_views * (2 if self.config.cd_attention_mid else 1)
        if sample.shape[0] % group:
            raise ValueError(
                f"A batch of {sample.shape[0]} rows; expected a multiple of {group}: (domain, object, view) with "
                f"{self.config.num_views} views."
            )
        return super().forward(sample, timestep, encoder_hidden_states, *args, **kwargs)


def _stock_name(block: Any) -> Any:
    """`CrossAttnDownBlockMV2D` -> `CrossAttnDownBlock2D`, one name or several."""
    return block.replace("MV2D", "2D") if isinstance(block, str) else tuple(_stock_name(name) for name in block)


def _current_keys(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    return {key.replace("_joint_twice.", "_joint_mid."): value for key, value in state_dict.items()}
