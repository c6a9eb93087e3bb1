"""The frozen image encoder: PIL images -> embeddings, through transformers' CLIP or SigLIP.

    encoder = Encoder("openai/clip-vit-base-patch32", "pooled")
    embeddings = encoder([Image.open("dog.jpg")])                    # (1, 1, 512) float16

`pooled` is one projected embedding an image, as CLIP compares it with text; `grid` is the class
token and every patch after the last layer norm, optionally averaged down to grid x grid patches.
Needs the extras: pip install -r requirements-clip.txt
"""

from pathlib import Path

import torch
import torch.nn.functional as F

from configurator import UserError


class Encoder:
    """A CLIP or SigLIP vision tower.

    Args:
        name: a transformers model name, or a folder in its format.
        features: "pooled" or "grid".
        grid: for grid features, patches a side after average pooling; 0 keeps them all.

    embedding_dim is D and n_positions P of the (B, P, D) that a call returns.
    Raises UserError where the extras or the model cannot be had.
    """

    def __init__(self, name: str, features: str = "pooled", grid: int = 0, device: str = "cpu"):
        try:
            import transformers
            from transformers import AutoConfig, AutoImageProcessor
        except ImportError as error:
            raise UserError(
                f"{error.name} is missing: pip install -r requirements-clip.txt"
            ) from None
        if name.startswith((".", "/", "assets/")) and not Path(name).is_dir():
            raise UserError(f"clip={name}: no such folder")
        transformers.logging.set_verbosity_error()
        try:
            kind = AutoConfig.from_pretrained(name).model_type
            if kind.startswith("clip"):
                model = transformers.CLIPVisionModelWithProjection.from_pretrained(name)
            elif kind.startswith("siglip"):
                model = transformers.AutoModel.from_pretrained(name)
            else:
                raise UserError(f"clip={name} is a {kind} model; CLIP or SigLIP is needed")
            self.processor = AutoImageProcessor.from_pretrained(name)
        except (OSError, ValueError, KeyError) as error:
            reason = str(error).strip().split("\n")[0]
            raise UserError(f"clip={name} could not be loaded: {reason}") from None
        self.name, self.features, self.grid, self.device = (
            name,
            features,
            grid,
            torch.device(device),
        )
        self.model = model.eval().to(self.device)
        self.tower = getattr(model, "vision_model", model)
        config = getattr(model.config, "vision_config", model.config)
        side = config.image_size // config.patch_size
        if grid > side:
            raise UserError(f"grid={grid}: {name} has only {side} x {side} patches")
        self.has_class = kind.startswith("clip")
        self.side = side
        if features == "pooled":
            self.n_positions = 1
            self.embedding_dim = config.projection_dim if self.has_class else config.hidden_size
        else:
            self.n_positions = self.has_class + (grid or side) ** 2
            self.embedding_dim = config.hidden_size

    def pixels(self, images: list) -> torch.Tensor:
        """PIL images, of any mode and size -> (B, 3, H, W) float32, as the model wants them."""
        images = [image.convert("RGB") for image in images]
        return self.processor(images=images, return_tensors="pt")["pixel_values"]

    @torch.inference_mode()
    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) -> (B, P, D) float16, on the CPU."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            out = self.tower(pixel_values=pixels.to(self.device))
            if self.features == "pooled":
                x = out.pooler_output
                x = self.model.visual_projection(x) if self.has_class else x
                x = x[:, None]
            else:
                x = out.last_hidden_state
                x = self.tower.post_layernorm(x) if self.has_class else x
                if self.grid:
                    first, patches = x[:, : self.has_class], x[:, self.has_class :]
                    patches = patches.transpose(1, 2).unflatten(2, (self.side, self.side))
                    patches = F.adaptive_avg_pool2d(patches, self.grid)  # (B, D, grid, grid)
                    x = torch.cat((first, patches.flatten(2).transpose(1, 2)), 1)
        return x.half().cpu()

    def __call__(self, images: list) -> torch.Tensor:
        """PIL images -> (B, P, D) float16."""
        return self.encode(self.pixels(images))
