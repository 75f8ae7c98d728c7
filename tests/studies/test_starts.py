"""What a study starts from beside the demo's corpus and random weights."""

from pathlib import Path

import torch

from cache_builder.stdlib_corpus import stdlib_prompts
from studies.corpora import author_answers
from studies.late_layers import late_layers
from tests.builder.conftest import make_target

SOURCE = '''
class A:
    def area(self, r):
        """The area of a circle of radius r."""
        return 3 * r * r
'''


def test_every_prompt_has_its_author_s_answer(tmp_path: Path) -> None:
    (tmp_path / "geometry.py").write_text(SOURCE)
    answers = author_answers(tmp_path, stdlib_prompts(tmp_path))
    assert list(answers) == stdlib_prompts(tmp_path)
    assert author_answers(tmp_path, []) == {}
    (answer,) = answers.values()
    assert answer.startswith("```python\ndef area(self, r):\n")
    assert answer.endswith("    return 3 * r * r\n```")


def test_late_layers_are_the_target_s_with_norms_of_its_scale() -> None:
    target = make_target()
    drafter = late_layers(target, (1, 3, 5), 0, layers=2, block_size=4)
    for mine, theirs in zip(drafter.layers, target.model.layers[-2:], strict=True):
        given = mine.state_dict()
        for name, weight in theirs.state_dict().items():
            assert torch.equal(given[name], weight), name
        # Inputs of independent channels, as the norm before leaves them: the root mean square of each query channel.
        rows = torch.randn(20_000, target.config.hidden_size) * theirs.input_layernorm.weight
        heads = (rows @ theirs.self_attn.q_proj.weight.T).view(len(rows), -1, drafter.config.head_dim)
        expected = heads.square().mean((0, 1)).sqrt()
        torch.testing.assert_close(given["self_attn.q_norm.weight"], expected, rtol=0.05, atol=0)
