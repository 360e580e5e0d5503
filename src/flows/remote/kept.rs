//! Answers of other servers that are kept for a while, so that the same question is not asked again and again.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use parking_lot::Mutex;

/// Answers by their questions. There are never more bytes of them than a bound; those whose time ends first go first.
#[derive(Debug)]
pub(super) struct Kept<K, V> {
    bytes_max: usize,
    answers: Mutex<Answers<K, V>>,
}

#[derive(Debug)]
struct Answers<K, V> {
    /// The uptime until which an answer is kept, its bytes, and the answer.
    by_question: BTreeMap<K, (Duration, usize, V)>,
    by_end: BTreeSet<(Duration, K)>,
    bytes: usize,
}

impl<K: Ord + Clone, V: Clone> Kept<K, V> {
    /// Keeps at most this many bytes of questions and answers.
    pub(super) fn new(bytes_max: usize) -> Self {
        let answers = Answers { by_question: BTreeMap::new(), by_end: BTreeSet::new(), bytes: 0 };
        Self { bytes_max, answers: Mutex::new(answers) }
    }

    /// The answer to a question, if its time has not ended.
    pub(super) fn find(&self, question: &K, now: Duration) -> Option<V> {
        let answers = self.answers.lock();
        let (end, _, answer) = answers.by_question.get(question)?;
        (now < *end).then(|| answer.clone())
    }

    /// Keeps an answer until this uptime. `bytes` are those of the question and the answer.
    pub(super) fn keep(&self, question: K, answer: V, bytes: usize, end: Duration) {
        let mut answers = self.answers.lock();
        answers.remove(&question);
        answers.bytes += bytes;
        answers.by_end.insert((end, question.clone()));
        answers.by_question.insert(question, (end, bytes, answer));
        while answers.bytes > self.bytes_max
            && let Some((_, first)) = answers.by_end.first().cloned()
        {
            answers.remove(&first);
        }
    }

    /// Keeps an answer no longer.
    pub(super) fn forget(&self, question: &K) {
        self.answers.lock().remove(question);
    }
}

impl<K: Ord + Clone, V> Answers<K, V> {
    fn remove(&mut self, question: &K) {
        if let Some((end, bytes, _)) = self.by_question.remove(question) {
            self.by_end.remove(&(end, question.clone()));
            self.bytes -= bytes;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_end_and_their_bytes_are_bounded() {
        let kept = Kept::new(100);
        let at = Duration::from_secs;
        kept.keep("first", 1, 40, at(10));
        kept.keep("second", 2, 40, at(5));
        assert_eq!((kept.find(&"first", at(4)), kept.find(&"second", at(4))), (Some(1), Some(2)));
        assert_eq!((kept.find(&"first", at(9)), kept.find(&"second", at(5))), (Some(1), None));
        kept.keep("third", 3, 40, at(20));
        assert_eq!((kept.find(&"second", at(4)), kept.find(&"first", at(4))), (None, Some(1)));
        kept.keep("first", 4, 60, at(30));
        assert_eq!((kept.find(&"first", at(25)), kept.find(&"third", at(15))), (Some(4), Some(3)));
        kept.forget(&"third");
        assert_eq!((kept.find(&"first", at(25)), kept.find(&"third", at(15))), (Some(4), None));
        kept.keep("large", 5, 101, at(40));
        assert_eq!(kept.find(&"large", at(30)), None);
        assert_eq!(kept.answers.lock().bytes, 0);
    }
}
