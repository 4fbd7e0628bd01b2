//! What a client asks of a model's reasoning, in the words of its chat template.
//!
//! Clients say it as OpenAI's levels of effort, as a budget of tokens, as on or off, or in a template's own variables. A template
//! understands some of that; which, is found by rendering a short conversation with each.

use serde_json::{Map, Value, json};

use crate::chat_template::ChatTemplate;
use crate::dialect::opens_reasoning;

/// A word that no template knows.
const NO_WORD: &str = "qzjx";

/// OpenAI's levels, the least first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Effort {
    /// No reasoning.
    None,
    /// As little as there is.
    Minimal,
    /// Little.
    Low,
    /// Some.
    Medium,
    /// Much.
    High,
    /// More.
    Xhigh,
    /// As much as there is.
    Max,
}

impl Effort {
    /// All of them with their names.
    pub const ALL: [(&'static str, Effort); 7] = [
        ("none", Effort::None),
        ("minimal", Effort::Minimal),
        ("low", Effort::Low),
        ("medium", Effort::Medium),
        ("high", Effort::High),
        ("xhigh", Effort::Xhigh),
        ("max", Effort::Max),
    ];

    /// The level of a name.
    pub fn from_name(name: &str) -> Option<Effort> {
        Effort::ALL.iter().find(|(known, _)| *known == name).map(|(_, effort)| *effort)
    }

    /// Its name.
    pub fn name(self) -> &'static str {
        Effort::ALL[self as usize].0
    }

    /// The level that a budget of tokens suggests. Clients who offer levels turn them into about 4,000, 10,000 and 32,000.
    pub fn of_budget(n_tokens: u32) -> Effort {
        match n_tokens {
            0 => Effort::None,
            1..=4_096 => Effort::Low,
            4_097..=16_384 => Effort::Medium,
            16_385..=32_768 => Effort::High,
            _ => Effort::Max,
        }
    }
}

/// How much a model should think before it answers; what is not said is left to its template.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Reasoning {
    /// Whether at all.
    pub is_on: Option<bool>,
    /// How hard.
    pub effort: Option<Effort>,
    /// Tokens at most.
    pub budget: Option<u32>,
}

impl Reasoning {
    /// A level; `none` is off.
    pub fn of_effort(effort: Effort) -> Reasoning {
        Reasoning { is_on: Some(effort != Effort::None), effort: Some(effort), budget: None }
    }

    /// `on`, `off` or the name of a level.
    pub fn from_word(word: &str) -> Option<Reasoning> {
        match word {
            "on" => Some(Reasoning { is_on: Some(true), ..Reasoning::default() }),
            "off" => Some(Reasoning { is_on: Some(false), ..Reasoning::default() }),
            word => Effort::from_name(word).map(Reasoning::of_effort),
        }
    }

    /// What variables of templates say, those of any template.
    pub fn of_variables(variables: &Map<String, Value>) -> Reasoning {
        let is_on = ["enable_thinking", "thinking"].iter().find_map(|name| variables.get(*name)?.as_bool());
        let effort = variables.get("reasoning_effort").and_then(Value::as_str).and_then(Effort::from_name);
        let budget = variables.get("thinking_budget").and_then(Value::as_u64).and_then(|n| u32::try_from(n).ok());
        let effort = effort.map(Reasoning::of_effort).unwrap_or_default();
        Reasoning { is_on, budget, ..Reasoning::default() }.or(effort)
    }

    /// What the other says where this one does not.
    pub fn or(self, other: Reasoning) -> Reasoning {
        Reasoning {
            is_on: self.is_on.or(other.is_on),
            effort: self.effort.or(other.effort),
            budget: self.budget.or(other.budget),
        }
    }
}

/// What a chat template lets a client say about reasoning.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ReasoningControls {
    /// It can be switched off.
    pub has_switch: bool,
    /// Levels that it knows, the least first.
    pub efforts: Vec<Effort>,
    /// Without being told anything the model thinks first.
    pub is_on: bool,
}

impl ReasoningControls {
    /// Finds out.
    pub(crate) fn of(template: &ChatTemplate) -> ReasoningControls {
        let messages = [json!({"role": "user", "content": "hi"})];
        let render = |variables: Value| {
            let variables = variables.as_object().cloned().unwrap_or_default();
            template.render(&messages, None, true, &variables).ok()
        };
        let switched = |is_on: bool| render(json!({"enable_thinking": is_on, "thinking": is_on}));
        let with = |word: &str| render(json!({"enable_thinking": true, "thinking": true, "reasoning_effort": word}));
        let mut controls = ReasoningControls {
            has_switch: switched(true) != switched(false),
            efforts: vec![],
            is_on: render(json!({})).is_some_and(|text| opens_reasoning(&text)),
        };
        let unknown = with(NO_WORD);
        let known: Vec<(&str, Effort, String)> =
            Effort::ALL.iter().filter_map(|(word, effort)| Some((*word, *effort, with(word)?))).collect();
        let has = |text: &str, word: &str| text.to_lowercase().split(|c: char| !c.is_alphanumeric()).any(|w| w == word);
        if unknown.as_deref().is_some_and(|text| has(text, NO_WORD)) {
            // It passes any word on; these are those of OpenAI's own model.
            controls.efforts = vec![Effort::Low, Effort::Medium, Effort::High];
            return controls;
        }
        let differs = |text: &str| unknown.as_deref() != Some(text);
        for (word, effort, text) in &known {
            // What it makes of any other word is one of the levels: the one that it names there and nowhere else.
            let is_default =
                || has(text, word) && known.iter().any(|(_, _, other)| differs(other) && !has(other, word));
            if differs(text) || is_default() {
                controls.efforts.push(*effort);
            }
        }
        controls
    }

    /// Variables that tell the template, and what it cannot be told.
    pub fn variables(&self, wanted: Reasoning) -> (Map<String, Value>, Vec<String>) {
        let mut variables = Map::new();
        let mut notes = vec![];
        if let Some(is_on) = wanted.is_on {
            // GLM's and Qwen's name for it, and DeepSeek's.
            variables.insert("enable_thinking".into(), json!(is_on));
            variables.insert("thinking".into(), json!(is_on));
        }
        let levels: Vec<Effort> = self.efforts.iter().copied().filter(|known| *known != Effort::None).collect();
        let effort = if wanted.is_on == Some(false) {
            match (self.has_switch, levels.first()) {
                (true, _) => None,
                _ if self.efforts.contains(&Effort::None) => Some(Effort::None),
                (false, Some(least)) => {
                    notes
                        .push("the chat template cannot switch reasoning off: it gets the least effort instead".into());
                    Some(*least)
                }
                (false, None) => {
                    if self.is_on {
                        notes.push("the chat template cannot switch reasoning off".into());
                    }
                    None
                }
            }
        } else {
            let asked = wanted.effort.filter(|effort| *effort != Effort::None);
            let asked = asked.or(wanted.budget.map(|n| Effort::of_budget(n).max(Effort::Minimal)));
            let distance = |known: Effort| (known as i32 - asked.unwrap_or(known) as i32).abs();
            let nearest = levels.iter().min_by_key(|known| (distance(**known), std::cmp::Reverse(**known)));
            match (asked, nearest) {
                (Some(asked), None) if wanted.effort.is_some() && (self.has_switch || self.is_on) => {
                    notes.push(format!(
                        "the chat template knows no levels of effort: {:?} only means that the model reasons",
                        asked.name()
                    ));
                }
                _ if wanted.is_on == Some(true) && levels.is_empty() && !self.has_switch && !self.is_on => {
                    notes.push("the chat template has no reasoning that could be switched on".into());
                }
                (Some(asked), Some(nearest)) if wanted.effort.is_some() && *nearest != asked => {
                    let names: Vec<&str> = levels.iter().map(|known| known.name()).collect();
                    let (asked, nearest) = (asked.name(), nearest.name());
                    notes.push(format!(
                        "the chat template knows the efforts {}: {asked:?} became {nearest:?}",
                        names.join(", ")
                    ));
                }
                _ => {}
            }
            asked.and(nearest).copied()
        };
        if let Some(effort) = effort {
            variables.insert("reasoning_effort".into(), json!(effort.name()));
        }
        (variables, notes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::chat_template::TemplateTokens;
    use crate::dialect::Dialect;

    /// GLM-5.3's way: a level always, no switch; any other word is the most.
    const GLM_53: &str = "[gMASK]<sop><|system|>Reasoning Effort: {{ (reasoning_effort if reasoning_effort in ['low', \
        'high'] else 'max') | capitalize }}{% for m in messages %}<|user|>{{ m.content }}{% endfor %}<|assistant|><think>";
    /// GLM-5.2's: a switch, and two levels while it is on.
    const GLM_52: &str = "[gMASK]<sop>{% if not (enable_thinking is defined and not enable_thinking) %}<|system|>Reasoning \
        Effort: {{ 'High' if reasoning_effort == 'high' else 'Max' }}{% endif %}<|assistant|>\
        {{ '</think>' if (enable_thinking is defined and not enable_thinking) else '<think>' }}";
    /// DeepSeek-V3.1's: a switch that is off.
    const V31: &str = "{% if thinking %}<think>{% else %}</think>{% endif %}";
    /// gpt-oss's: any word.
    const HARMONY: &str = "Reasoning: {{ reasoning_effort or 'medium' }}<|start|>assistant";
    /// One that refuses others.
    const STRICT: &str = "{% if reasoning_effort and reasoning_effort not in ['none', 'high'] %}{{ raise_exception('no') }}\
        {% endif %}{% if reasoning_effort == 'high' %}<think>{% endif %}";

    #[test]
    fn wishes_become_the_words_of_the_template() {
        use Effort::{High, Low, Max, Medium, None as Off};
        let template = |source: &str| ChatTemplate::new(source, TemplateTokens::default()).unwrap();
        let controls = |has_switch: bool, is_on: bool, efforts: &[Effort]| ReasoningControls {
            has_switch,
            is_on,
            efforts: efforts.to_vec(),
        };
        let effort = |word: &str| Reasoning::from_word(word).unwrap();
        let budget = |n: u32| Reasoning { is_on: Some(true), effort: None, budget: Some(n) };
        let on_off = |is_on: bool| json!({"enable_thinking": is_on, "thinking": is_on});
        let with = |word: &str| json!({"enable_thinking": true, "thinking": true, "reasoning_effort": word});
        let off_with = |word: &str| json!({"enable_thinking": false, "thinking": false, "reasoning_effort": word});
        // The wish, the template's variables, and whether something is said.
        type Case = (Reasoning, Value, bool);
        let nothing = (Reasoning::default(), json!({}), false);
        let all: [(ChatTemplate, ReasoningControls, Vec<Case>); 7] = [
            (
                template(GLM_53),
                controls(false, true, &[Low, High, Max]),
                vec![
                    nothing.clone(),
                    (effort("on"), on_off(true), false),
                    (effort("off"), off_with("low"), true),
                    (effort("none"), off_with("low"), true),
                    (effort("minimal"), with("low"), true),
                    (effort("low"), with("low"), false),
                    (effort("medium"), with("high"), true),
                    (effort("high"), with("high"), false),
                    (effort("xhigh"), with("max"), true),
                    (effort("max"), with("max"), false),
                    (budget(1024), with("low"), false),
                    (budget(10_000), with("high"), false),
                    (budget(31_999), with("high"), false),
                    (budget(100_000), with("max"), false),
                ],
            ),
            (
                template(GLM_52),
                controls(true, true, &[High, Max]),
                vec![
                    (effort("off"), on_off(false), false),
                    (effort("low"), with("high"), true),
                    (effort("max"), with("max"), false),
                ],
            ),
            (
                template(V31),
                controls(true, false, &[]),
                vec![
                    nothing.clone(),
                    (effort("off"), on_off(false), false),
                    (effort("on"), on_off(true), false),
                    (effort("high"), on_off(true), true),
                    (budget(4096), on_off(true), false),
                ],
            ),
            (
                ChatTemplate::built_in(Dialect::DeepSeekV32).unwrap(),
                controls(true, false, &[]),
                vec![
                    (effort("none"), on_off(false), false),
                    (effort("on"), on_off(true), false),
                    (effort("low"), on_off(true), true),
                ],
            ),
            (
                template(HARMONY),
                controls(false, false, &[Low, Medium, High]),
                vec![
                    (effort("max"), with("high"), true),
                    (effort("medium"), with("medium"), false),
                    (effort("off"), off_with("low"), true),
                ],
            ),
            (
                template(STRICT),
                controls(false, false, &[Off, High]),
                vec![(effort("off"), off_with("none"), false), (effort("low"), with("high"), true)],
            ),
            (
                template("{{ messages[0].content }}"),
                controls(false, false, &[]),
                vec![
                    (effort("off"), on_off(false), false),
                    (effort("on"), on_off(true), true),
                    (effort("high"), on_off(true), true),
                ],
            ),
        ];
        for (template, expected, cases) in all {
            let source = template.source();
            assert_eq!(template.reasoning(), &expected, "{source}");
            for (wish, variables, is_said) in cases {
                let (found, notes) = expected.variables(wish);
                assert_eq!(
                    (Value::Object(found), !notes.is_empty()),
                    (variables, is_said),
                    "{source} {wish:?} {notes:?}"
                );
            }
        }
    }

    #[test]
    fn variables_of_any_template_are_wishes() {
        let read = |variables: Value| Reasoning::of_variables(variables.as_object().unwrap());
        let off = Reasoning::from_word("off").unwrap();
        assert_eq!(read(json!({"enable_thinking": false})), off);
        assert_eq!(read(json!({"thinking": false})), off);
        assert_eq!(read(json!({"reasoning_effort": "high"})), Reasoning::of_effort(Effort::High));
        assert_eq!(read(json!({"reasoning_effort": "none"})), Reasoning::of_effort(Effort::None));
        assert_eq!(read(json!({"thinking_budget": 5})).budget, Some(5));
        assert_eq!(read(json!({"thinking": "much", "reasoning_effort": 3, "x": null})), Reasoning::default());
    }
}
