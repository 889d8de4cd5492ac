"""The embedded reviews are balanced and distinct, and counts of words do not classify them."""

from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression

from hf_minigpt.data.tales.reviews import BLAME, PRAISE, tale_reviews


def test_first_reviews_of_a_seed_do_not_depend_on_their_number():
    texts, labels = tale_reviews(200)
    assert tale_reviews(50) == (texts[:50], labels[:50])
    assert len(set(texts)) == 200 and labels == [0, 1] * 100
    assert tale_reviews(50, seed=1)[0] != texts[:50]


def test_counts_of_words_and_word_pairs_classify_about_two_thirds():
    texts, labels = tale_reviews(1500)
    for longest in (1, 2):
        vectorizer = TfidfVectorizer(ngram_range=(1, longest), token_pattern=r"\b\w+\b")
        rows = vectorizer.fit_transform(texts[:1200])
        model = LogisticRegression(C=10, max_iter=500).fit(rows, labels[:1200])
        accuracy = model.score(vectorizer.transform(texts[1200:]), labels[1200:])
        # above chance, since some reviews also have a direct judgement
        assert 0.55 < accuracy < 0.8


def test_sentence_structure_decides_the_label():
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
                # of two clauses, the reviewer's own final judgement of this tale counts
                first = sentence.startswith(("In the end", "I found", "This one"))
                votes.add(judged[0] if first else judged[1])
        assert votes == {label}, text
