"""The embedded reviews: balanced, different, and impossible to tell by their words."""

from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression

from hf_minigpt.data.tales.reviews import BLAME, PRAISE, tale_reviews


def test_first_ones_are_the_same_for_any_number():
    texts, labels = tale_reviews(200)
    assert tale_reviews(50) == (texts[:50], labels[:50])
    assert len(set(texts)) == 200 and labels == [0, 1] * 100
    assert tale_reviews(50, seed=1)[0] != texts[:50]


def test_words_and_pairs_of_words_do_not_tell():
    texts, labels = tale_reviews(1500)
    for longest in (1, 2):
        vectorizer = TfidfVectorizer(ngram_range=(1, longest), token_pattern=r"\b\w+\b")
        rows = vectorizer.fit_transform(texts[:1200])
        model = LogisticRegression(C=10, max_iter=500).fit(rows, labels[:1200])
        accuracy = model.score(vectorizer.transform(texts[1200:]), labels[1200:])
        # above chance: some reviews also say it straight away
        assert 0.55 < accuracy < 0.8


def test_a_reader_who_knows_the_constructions_tells_all():
    for text, label in zip(*tale_reviews(300), strict=True):
        votes = set()
        for sentence in text.replace("!", ".").split(". "):
            words = [word.strip(".,") for word in sentence.split()]
            judged = [int(word in PRAISE) for word in words if word in PRAISE + BLAME]
            if not judged:
                continue
            if len(judged) == 1:
                votes.add(judged[0] ^ (words[0] == "Nobody" or "doubt" in words))
            else:
                # in the pairs of clauses, the reviewer's own and final judgement of this tale counts
                first = sentence.startswith(("In the end", "I found", "This one"))
                votes.add(judged[0] if first else judged[1])
        assert votes == {label}, text
