"""Generated answers and their metrics."""

import pytest
import torch

from hf_minigpt.instructions.answers import Answer, answer_metrics, generate_answers
from hf_minigpt.instructions.records import Conversation
from tests.instructions.tiny_chat import chat_model, some_conversations


@pytest.mark.parametrize("name", ["modern", "gpt2", "transformer"])
def test_answers_in_a_batch_equal_those_of_single_prompts(name):
    model, tokenizer, _ = chat_model(name)
    conversations = some_conversations()
    # so that some answers end and some do not
    model.get_output_embeddings().weight.data[tokenizer.eos_token_id] *= 1.5
    answers = generate_answers(model, tokenizer, conversations, batch_size=5, max_new_tokens=12)
    assert [answer.conversation for answer in answers] == conversations
    for answer in answers[::4]:
        ids = tokenizer.apply_chat_template(answer.conversation.prompt, add_generation_prompt=True)["input_ids"]
        generated = []
        while len(generated) < 12 and tokenizer.eos_token_id not in generated:
            generated.append(model(torch.tensor([ids + generated])).logits[0, -1].argmax().item())
        assert answer.ended == (tokenizer.eos_token_id in generated)
        assert answer.text == tokenizer.decode(generated, skip_special_tokens=True)


def test_metrics_are_reported_by_category():
    def answer(category, text, ended=True):
        messages = ({"role": "user", "content": "?"}, {"role": "assistant", "content": "yes"})
        return Answer(Conversation(messages, category), text, ended)

    answers = [answer("a", " yes"), answer("a", "yes, no"), answer("b", "yes"), answer("b", "yes", False)]
    assert answer_metrics(answers) == {
        "exact_match": 0.75,
        "answers_ended": 0.75,
        "answers": 4,
        "exact_match/a": 0.5,
        "exact_match/b": 1.0,
    }
