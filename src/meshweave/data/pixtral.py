"""How is Pixtral's processor had without torchvision? Its stock class wants it for the import alone."""

from typing import Any

from transformers import ProcessorMixin


class PixtralProcessor(ProcessorMixin):  # type: ignore[misc]
    """What the stock class (`transformers.models.pixtral`, 5.23) does with text and images: a token for every square of
    `patch_size` · `spatial_merge_size` pixels a side, a break behind every row of them, an end behind the last."""

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        patch_size: int = 16,
        spatial_merge_size: int = 1,
        chat_template: str | None = None,
        image_token: str = "[IMG]",
        image_break_token: str = "[IMG_BREAK]",
        image_end_token: str = "[IMG_END]",
    ) -> None:
        super().__init__(image_processor, tokenizer, chat_template=chat_template)
        self.side = patch_size * spatial_merge_size
        self.image_token, self.image_break_token, self.image_end_token = image_token, image_break_token, image_end_token
        self.image_token_id = tokenizer.convert_tokens_to_ids(image_token)

    @property  # type: ignore[misc]
    def image_token_ids(self) -> list[int | None]:
        marks = (self.image_token, self.image_break_token, self.image_end_token)
        return [self.tokenizer.convert_tokens_to_ids(mark) for mark in marks]

    def _process_images(self, images: Any, **options: Any) -> Any:
        return super()._process_images(images, **options | {"patch_size": self.side})

    def replace_image_token(self, image_inputs: Any, image_idx: int, **_: Any) -> str:
        rows, columns = (int(side) // self.side for side in image_inputs["image_sizes"][image_idx])
        text = (self.image_token * columns + self.image_break_token) * rows
        return text.removesuffix(self.image_break_token) + self.image_end_token
