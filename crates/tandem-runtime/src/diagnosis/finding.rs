//! One line of a doctor's report.

use serde::Serialize;

/// How good or bad it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Level {
    /// As it should be.
    Ok,
    /// It works, and could be faster or safer.
    Warning,
    /// It does not work, or far too slowly.
    Problem,
}

impl Level {
    /// As in JSON.
    pub fn name(self) -> &'static str {
        match self {
            Level::Ok => "ok",
            Level::Warning => "warning",
            Level::Problem => "problem",
        }
    }
}

/// Something that was looked at.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Finding {
    /// Where it was looked: `processor.kernels`, `memory.locked`. Programs may rely on it.
    pub id: &'static str,
    /// How good or bad it is.
    pub level: Level,
    /// In a few words.
    pub what: String,
    /// What was seen.
    pub evidence: String,
    /// What to do; nothing if all is well.
    pub remedy: Option<String>,
}

impl Finding {
    /// Without a remedy.
    pub fn new(id: &'static str, level: Level, what: impl Into<String>, evidence: impl Into<String>) -> Finding {
        Finding { id, level, what: what.into(), evidence: evidence.into(), remedy: None }
    }

    /// The same at another level, in other words.
    #[must_use]
    pub fn with_level(self, level: Level, what: impl Into<String>) -> Finding {
        Finding { level, what: what.into(), ..self }
    }

    /// The same with other evidence.
    #[must_use]
    pub fn with_evidence(self, evidence: impl Into<String>) -> Finding {
        Finding { evidence: evidence.into(), ..self }
    }

    /// The same with a remedy.
    #[must_use]
    pub fn with_remedy(self, remedy: impl Into<String>) -> Finding {
        Finding { remedy: Some(remedy.into()), ..self }
    }
}
