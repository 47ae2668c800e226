"""How the prompts of a task become token ids: as they stand, or as a user's message in the model's own chat template."""

from __future__ import annotations

from collections.abc import Sequence

from edgeq.errors import TokenizerError
from edgeq.runtime.worker import ScoringWorker


class PromptWriter:
    """Writes prompts for the model of one worker. Prompts may spell special tokens."""

    def __init__(self, worker: ScoringWorker, *, chat: bool = False) -> None:
        """Raises TokenizerError when a chat template is asked for and the model has none."""
        if chat and worker.facts.chat_template is None:
            raise TokenizerError(f"{worker.artifact}: the model has no chat template. Leave out --chat.")
        self.worker, self.chat = worker, chat

    def text(self, prompt: str) -> str:
        """The text that the model sees."""
        if not self.chat:
            return prompt
        from edgeq.chat import render

        facts = self.worker.facts
        assert facts.chat_template is not None
        messages = [{"role": "user", "content": prompt}]
        return render(facts.chat_template, messages, add_generation_prompt=True, bos_token=facts.bos_text, eos_token=facts.eos_text)

    def joined(self, prompt: str, continuations: Sequence[str]) -> tuple[str, list[str]]:
        """The prompt, and each continuation after it. Without a template white space at its end goes to the continuations."""
        if self.chat:
            text = self.text(prompt)
            return text, [text + continuation for continuation in continuations]
        text = prompt.rstrip()
        space = prompt[len(text) :]
        texts = [text + (space or ("" if not text or part[0].isspace() else " ")) + part for part in continuations]
        return text, texts

    def ids(self, text: str) -> list[int]:
        """Token ids; a template writes its own BOS, other texts get the one that the model wants."""
        return self.worker.tokenize(text, add_special=not self.chat, parse_special=True)
