//! What Temporal's worker core measures, as declared metrics of ours on the role's own `/metrics`: its own exporter would be
//! one more port, with buckets that begin where our turns end. What is not declared is not kept, and of the core's labels
//! only those with few values.

use std::{collections::HashMap, sync::Arc, time::Duration};

use prometheus::IntGaugeVec;
use reliant_telemetry::metrics as declared;
use temporalio_common::telemetry::metrics::{
    CoreMeter, Counter, CounterBase, Gauge, GaugeBase, GaugeF64, Histogram, HistogramDuration, HistogramDurationBase,
    HistogramF64, MetricAttributable, MetricAttributes, MetricParameters, NewAttributes, TemporalMeter, UpDownCounter,
};

#[derive(Debug)]
pub struct Meter {
    /// For what is not declared.
    nothing: TemporalMeter,
}

impl Default for Meter {
    fn default() -> Self {
        Self { nothing: TemporalMeter::no_op() }
    }
}

/// The core's name of a counter, and ours.
fn counter(name: &str) -> Option<&'static prometheus::IntCounter> {
    Some(match name {
        "temporal_activity_execution_failed" => &declared::TEMPORAL_ACTIVITY_FAILED,
        "temporal_sticky_cache_hit" => &declared::TEMPORAL_STICKY_HIT,
        "temporal_sticky_cache_miss" => &declared::TEMPORAL_STICKY_MISS,
        "temporal_sticky_cache_total_forced_eviction" => &declared::TEMPORAL_STICKY_EVICTED,
        _ => return None,
    })
}

fn duration(name: &str) -> Option<&'static prometheus::Histogram> {
    Some(match name {
        "temporal_workflow_task_schedule_to_start_latency" => &declared::TEMPORAL_WORKFLOW_TASK_SCHEDULED,
        "temporal_workflow_task_execution_latency" => &declared::TEMPORAL_WORKFLOW_TASK_EXECUTION,
        "temporal_workflow_task_replay_latency" => &declared::TEMPORAL_WORKFLOW_TASK_REPLAY,
        "temporal_activity_schedule_to_start_latency" => &declared::TEMPORAL_ACTIVITY_SCHEDULED,
        "temporal_activity_execution_latency" => &declared::TEMPORAL_ACTIVITY_EXECUTION,
        _ => return None,
    })
}

/// The gauge, and the one label of it.
fn gauge(name: &str) -> Option<LabelledGauge> {
    let labelled = |gauge: &'static IntGaugeVec, label| Some(LabelledGauge { gauge, label });
    match name {
        "temporal_worker_task_slots_available" => labelled(&declared::TEMPORAL_SLOTS_AVAILABLE, "worker_type"),
        "temporal_worker_task_slots_used" => labelled(&declared::TEMPORAL_SLOTS_USED, "worker_type"),
        "temporal_num_pollers" => labelled(&declared::TEMPORAL_POLLERS, "poller_type"),
        _ => None,
    }
}

impl CoreMeter for Meter {
    fn new_attributes(&self, attributes: NewAttributes) -> MetricAttributes {
        MetricAttributes::NoOp(Arc::new(attributes.into()))
    }

    fn extend_attributes(&self, existing: MetricAttributes, attributes: NewAttributes) -> MetricAttributes {
        let mut all: HashMap<String, String> = match existing {
            MetricAttributes::NoOp(labels) => Arc::unwrap_or_clone(labels),
            _ => HashMap::new(),
        };
        all.extend(HashMap::from(attributes));
        MetricAttributes::NoOp(Arc::new(all))
    }

    fn counter(&self, params: MetricParameters) -> Counter {
        if params.name == "temporal_workflow_task_execution_failed" {
            return Counter::new(Arc::new(Failures));
        }
        match counter(&params.name) {
            Some(counter) => Counter::new(Arc::new(Counting(counter))),
            None => self.nothing.counter(params),
        }
    }

    fn histogram_duration(&self, params: MetricParameters) -> HistogramDuration {
        match duration(&params.name) {
            Some(histogram) => HistogramDuration::new(Arc::new(Timing(histogram))),
            None => self.nothing.histogram_duration(params),
        }
    }

    fn gauge(&self, params: MetricParameters) -> Gauge {
        if params.name == "temporal_sticky_cache_size" {
            return Gauge::new(Arc::new(Level(declared::TEMPORAL_STICKY_SIZE.clone())));
        }
        match gauge(&params.name) {
            Some(gauge) => Gauge::new(Arc::new(gauge)),
            None => self.nothing.gauge(params),
        }
    }

    fn histogram(&self, params: MetricParameters) -> Histogram {
        self.nothing.histogram(params)
    }

    fn histogram_f64(&self, params: MetricParameters) -> HistogramF64 {
        self.nothing.histogram_f64(params)
    }

    fn gauge_f64(&self, params: MetricParameters) -> GaugeF64 {
        self.nothing.gauge_f64(params)
    }

    fn up_down_counter(&self, params: MetricParameters) -> UpDownCounter {
        self.nothing.up_down_counter(params)
    }
}

type Bound<T> = Result<Box<T>, Box<dyn std::error::Error>>;

#[derive(Clone, Copy)]
struct Counting(&'static prometheus::IntCounter);

impl CounterBase for Counting {
    fn adds(&self, value: u64) {
        self.0.inc_by(value);
    }
}

impl MetricAttributable<Box<dyn CounterBase>> for Counting {
    fn with_attributes(&self, _: &MetricAttributes) -> Bound<dyn CounterBase> {
        Ok(Box::new(*self))
    }
}

/// Failed workflow tasks, by cause.
struct Failures;

impl MetricAttributable<Box<dyn CounterBase>> for Failures {
    fn with_attributes(&self, attributes: &MetricAttributes) -> Bound<dyn CounterBase> {
        let cause = value(attributes, "failure_reason");
        Ok(Box::new(Failed(declared::TEMPORAL_WORKFLOW_TASK_FAILED.with_label_values(&[cause]))))
    }
}

struct Failed(prometheus::IntCounter);

impl CounterBase for Failed {
    fn adds(&self, value: u64) {
        self.0.inc_by(value);
    }
}

#[derive(Clone, Copy)]
struct Timing(&'static prometheus::Histogram);

impl HistogramDurationBase for Timing {
    fn records(&self, value: Duration) {
        self.0.observe(value.as_secs_f64());
    }
}

impl MetricAttributable<Box<dyn HistogramDurationBase>> for Timing {
    fn with_attributes(&self, _: &MetricAttributes) -> Bound<dyn HistogramDurationBase> {
        Ok(Box::new(*self))
    }
}

#[derive(Clone)]
struct Level(prometheus::IntGauge);

impl GaugeBase for Level {
    fn records(&self, value: u64) {
        self.0.set(i64::try_from(value).unwrap_or(i64::MAX));
    }
}

impl MetricAttributable<Box<dyn GaugeBase>> for Level {
    fn with_attributes(&self, _: &MetricAttributes) -> Bound<dyn GaugeBase> {
        Ok(Box::new(self.clone()))
    }
}

struct LabelledGauge {
    gauge: &'static IntGaugeVec,
    label: &'static str,
}

impl MetricAttributable<Box<dyn GaugeBase>> for LabelledGauge {
    fn with_attributes(&self, attributes: &MetricAttributes) -> Bound<dyn GaugeBase> {
        Ok(Box::new(Level(self.gauge.with_label_values(&[value(attributes, self.label)]))))
    }
}

fn value<'a>(attributes: &'a MetricAttributes, label: &str) -> &'a str {
    match attributes {
        MetricAttributes::NoOp(labels) => labels.get(label).map_or("", String::as_str),
        _ => "",
    }
}
