"""Reads held-out pictures with the model that the demo trained: plain transformers, nothing of meshweave's runtime.

python examples/read_digits.py [model folder]
"""

import sys

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.utils import logging

from meshweave.data.quickstart import DigitsSource


def main(folder: str = "runs/digits/model", pictures: int = 6) -> None:
    """Prints question, digits in the picture and the model's answer for a few samples it has never seen."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(folder, backend="pil")
    source = DigitsSource("held_out", samples=pictures, seed=1)
    print(f"\n{pictures} held-out samples, answered by {folder}:")
    for index in range(pictures):
        question, answer = source[index].messages
        prompt = processor.apply_chat_template([question], add_generation_prompt=True, tokenize=False)
        images = [media.load() for media in source[index].media] or None
        inputs = processor(text=prompt, images=images, return_tensors="pt")
        inputs.pop("token_type_ids", None)
        written = model.generate(**inputs, max_new_tokens=10, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        text = processor.tokenizer.decode(written, skip_special_tokens=True)
        expected = answer["content"][0]["text"]
        asked = next(part["text"] for part in question["content"] if part["type"] == "text")
        mark = "✓" if text == expected else "✗"
        print(f"  {asked:<36} expected {expected:<10} answered {text:<10} {mark}")


if __name__ == "__main__":
    main(*sys.argv[1:])
