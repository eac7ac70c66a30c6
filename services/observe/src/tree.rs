//! A trace as a tree: who is below whom, what is missing, which spans the end waited for, where the turn's time went.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    fmt::Write as _,
};

use reliant_telemetry::{
    metrics::Phase,
    names::{attr, span as names},
};
use serde::Serialize;

use crate::model::Span;

/// A trace deeper than this is shown flat from there on.
const DEPTH_MAX: usize = 64;

/// One line of the tree, in the order in which it is drawn.
#[derive(Debug, Clone, Serialize)]
pub struct Node {
    #[serde(flatten)]
    pub span: Span,
    pub depth: usize,
    /// The end of the trace waited for it.
    pub critical: bool,
    /// Its parent is not here.
    pub orphan: bool,
}

/// Spans that name a parent which is not among them.
pub fn orphans(spans: &[Span]) -> Vec<&Span> {
    let ids: HashSet<&str> = spans.iter().map(|span| span.span_id.as_str()).collect();
    spans.iter().filter(|span| !span.parent_id.is_empty() && !ids.contains(span.parent_id.as_str())).collect()
}

/// Depth first; roots and orphans at depth 0; siblings by their beginning.
pub fn nodes(spans: &[Span]) -> Vec<Node> {
    let tree = Tree::new(spans);
    let critical = tree.critical();
    let mut nodes = Vec::with_capacity(spans.len());
    let mut todo: Vec<(usize, usize)> = tree.roots.iter().rev().map(|root| (*root, 0)).collect();
    while let Some((index, depth)) = todo.pop() {
        let span = &spans[index];
        nodes.push(Node {
            span: span.clone(),
            depth: depth.min(DEPTH_MAX),
            critical: critical.contains(&index),
            orphan: depth == 0 && !span.parent_id.is_empty(),
        });
        todo.extend(tree.children[index].iter().rev().map(|child| (*child, depth + 1)));
    }
    nodes
}

/// Seconds of each phase, in the order of a turn; empty where no turn's round was committed yet.
pub fn phases(spans: &[Span]) -> Vec<(&'static str, f64)> {
    let mut sums: BTreeMap<&str, f64> = BTreeMap::new();
    for span in spans {
        for phase in Phase::ALL {
            if let Some(seconds) = span.attributes.get(attr::phase(*phase)).and_then(serde_json::Value::as_f64) {
                let sum = sums.entry(phase.as_str()).or_default();
                // Replicas give a turn's end to their viewers side by side; all other phases follow one another.
                *sum = if *phase == Phase::Fanout { seconds.max(*sum) } else { seconds + *sum };
            }
        }
    }
    Phase::ALL.iter().filter_map(|phase| Some((phase.as_str(), *sums.get(phase.as_str())?))).collect()
}

/// For a terminal. A star marks what the end waited for.
pub fn text(spans: &[Span]) -> String {
    let mut out = String::new();
    let begin = spans.iter().map(|span| span.start_ns).min().unwrap_or_default();
    let end = spans.iter().map(|span| span.end_ns).max().unwrap_or_default();
    let total = (end - begin) as f64 / 1e6;
    let _ = writeln!(out, "{} spans in {total:.1} ms", spans.len());
    for node in nodes(spans) {
        let Node { span, depth, critical, orphan } = node;
        let _ = writeln!(
            out,
            "{:>10.1} {:>9.2} ms {} {}{} [{} {}]{}{}{}{}",
            span.start_ns.saturating_sub(begin) as f64 / 1e6,
            span.seconds() * 1e3,
            if critical { "*" } else { " " },
            "  ".repeat(depth),
            span.name,
            span.service.trim_start_matches("reliant-"),
            span.kind,
            detail(&span),
            if span.links.is_empty() { String::new() } else { format!(" links={}", span.links.len()) },
            if span.error { " ERROR" } else { "" },
            if orphan { " ORPHAN" } else { "" },
        );
    }
    let phases = phases(spans);
    if !phases.is_empty() {
        let sum: f64 = phases.iter().map(|(_, seconds)| seconds).sum();
        let each: Vec<_> = phases.iter().map(|(name, seconds)| format!("{name} {:.1}", seconds * 1e3)).collect();
        let _ = writeln!(out, "phases, ms: {} = {:.1}", each.join(" + "), sum * 1e3);
    }
    out
}

/// The few attributes that tell one span from its siblings.
fn detail(span: &Span) -> String {
    const SHOWN: &[&str] = &[
        attr::MESSAGING_TEMPLATE,
        attr::FRAME,
        attr::GEN_AI_TOOL_NAME,
        attr::TURN_ITERATION,
        attr::TURN_FENCE,
        attr::TOOL_GENERATION,
        attr::TOOL_STATUS,
        attr::DB_OPERATION,
        attr::RPC_STATUS,
        attr::ERROR_TYPE,
    ];
    let shown = SHOWN.iter().filter_map(|key| {
        let text = match span.attributes.get(*key)? {
            serde_json::Value::String(text) => text.clone(),
            other => other.to_string(),
        };
        Some(format!(" {}={text}", key.rsplit('.').next().unwrap_or(key)))
    });
    shown.collect()
}

struct Tree<'a> {
    spans: &'a [Span],
    roots: Vec<usize>,
    children: Vec<Vec<usize>>,
    /// The end of a span or of what came of it, whichever is later: a hop has ended when what it caused begins. Without
    /// what viewers were told.
    ends: Vec<u64>,
}

impl<'a> Tree<'a> {
    fn new(spans: &'a [Span]) -> Self {
        let places: HashMap<&str, usize> =
            spans.iter().enumerate().map(|(n, span)| (span.span_id.as_str(), n)).collect();
        let mut children = vec![Vec::new(); spans.len()];
        let mut roots = Vec::new();
        for (index, span) in spans.iter().enumerate() {
            match places.get(span.parent_id.as_str()) {
                Some(parent) if *parent != index && !is_above(spans, &places, index, *parent) => {
                    children[*parent].push(index);
                }
                _ => roots.push(index),
            }
        }
        let by_start = |index: &usize| (spans[*index].start_ns, spans[*index].end_ns);
        roots.sort_by_key(by_start);
        children.iter_mut().for_each(|of| of.sort_by_key(by_start));
        let mut tree = Self { spans, roots, children, ends: vec![0; spans.len()] };
        let mut order = tree.roots.clone();
        let mut at = 0;
        while at < order.len() {
            order.extend(tree.children[order[at]].iter().copied());
            at += 1;
        }
        for index in order.into_iter().rev() {
            let below = tree.children[index].iter().filter(|child| !stands_beside(&spans[**child]));
            let below = below.map(|child| tree.ends[*child]).max();
            tree.ends[index] = tree.spans[index].end_ns.max(below.unwrap_or_default());
        }
        tree
    }

    /// Walks back from the last end: up to the root, and on each level back through what had to end before. What viewers
    /// are told on the way holds up nothing; only the last of it is the end itself.
    fn critical(&self) -> HashSet<usize> {
        let mut marked = HashSet::new();
        let all = 0..self.spans.len();
        let Some(last) = all.max_by_key(|index| self.spans[*index].end_ns) else { return marked };
        let parents: HashMap<usize, usize> = self
            .children
            .iter()
            .enumerate()
            .flat_map(|(of, below)| below.iter().map(move |child| (*child, of)))
            .collect();
        marked.insert(last);
        let mut todo = vec![(last, self.spans[last].end_ns)];
        let mut at = last;
        while let Some(above) = parents.get(&at) {
            marked.insert(*above);
            todo.push((*above, self.spans[at].start_ns));
            at = *above;
        }
        while let Some((index, mut until)) = todo.pop() {
            let children = &self.children[index];
            loop {
                let running = children.iter().copied().filter(|child| {
                    !marked.contains(child)
                        && !stands_beside(&self.spans[*child])
                        && self.spans[*child].start_ns < until
                });
                // Of those that ran until that moment, the one that had run longest.
                let waited_for = running
                    .max_by_key(|child| (self.ends[*child].min(until), std::cmp::Reverse(self.spans[*child].start_ns)));
                let Some(child) = waited_for else { break };
                marked.insert(child);
                todo.push((child, self.ends[child].min(until)));
                until = self.spans[child].start_ns;
            }
        }
        marked
    }
}

/// What tells viewers, and what only says when the rounds beside it began and ended.
fn stands_beside(span: &Span) -> bool {
    matches!(span.name.split(' ').next(), Some(names::BUS_PUBLISH | names::TURN_BURST))
}

/// Whether `index` is an ancestor of `parent`: what a hostile sender calls a tree may be a ring.
fn is_above(spans: &[Span], places: &HashMap<&str, usize>, index: usize, parent: usize) -> bool {
    let mut at = parent;
    for _ in 0..spans.len() {
        match places.get(spans[at].parent_id.as_str()) {
            Some(next) if *next == index => return true,
            Some(next) if *next != at => at = *next,
            _ => return false,
        }
    }
    true
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn span(id: u64, parent: u64, start: u64, end: u64) -> Span {
        Span {
            trace_id: "t".into(),
            span_id: format!("{id:016x}"),
            parent_id: if parent == 0 { String::new() } else { format!("{parent:016x}") },
            name: format!("s{id}"),
            kind: "internal",
            start_ns: start,
            end_ns: end,
            error: false,
            attributes: BTreeMap::new(),
            links: vec![],
            service: "reliant-api".into(),
            instance: String::new(),
        }
    }

    #[test]
    fn the_critical_path_goes_through_what_ended_last() {
        // A hop that ended, two parallel calls below it, of which the second ended last.
        let spans = [span(1, 0, 0, 1), span(2, 1, 2, 10), span(3, 1, 2, 20), span(4, 3, 5, 19), span(5, 9, 3, 4)];
        let marked: Vec<_> = nodes(&spans).iter().filter(|n| n.critical).map(|n| n.span.name.clone()).collect();
        assert_eq!(marked, ["s1", "s3", "s4"]);
        assert_eq!(orphans(&spans).len(), 1);
        assert!(text(&spans).contains("ORPHAN"));
        // Three rounds, each of which begins while the one before is about to end; viewers are told beside them.
        let told = |id, parent, start, end| Span { name: "publish x".into(), ..span(id, parent, start, end) };
        let spans = [span(1, 0, 0, 1), span(2, 1, 2, 10), told(3, 1, 9, 15), span(4, 1, 10, 20), told(5, 1, 19, 25)];
        let marked: Vec<_> = nodes(&spans).iter().filter(|n| n.critical).map(|n| n.span.span_id.clone()).collect();
        assert_eq!(marked.iter().map(|id| &id[15..]).collect::<String>(), "1245");
    }

    proptest! {
        /// Whatever arrives, each span is drawn once.
        #[test]
        fn any_parents_make_a_tree(parents in proptest::collection::vec(0u64..12, 1..12)) {
            let spans: Vec<_> =
                parents.iter().zip(1..).map(|(parent, id)| span(id, *parent, id, id + 5)).collect();
            // A ring has no root; it is cut somewhere, and nothing of it is lost.
            prop_assert_eq!(nodes(&spans).len(), spans.len());
        }
    }
}
