//! Jinja2's arithmetic, text and filters on minijinja, with limits: a template comes with a model, so it is data of a
//! stranger.
//!
//! minijinja compiles a template to instructions. Those whose meaning differs from Python's, or that make values of any
//! size, are replaced by calls of the functions here ([`patch`]). A rendering has fuel (instructions), and a budget of
//! bytes that its values and its output may take in all; it runs on a stack of its own.

use std::cell::Cell;
use std::sync::Arc;

use minijinja::machinery::ast::{BinOpKind, CallArg, Expr, Stmt};
use minijinja::machinery::{CompiledTemplate, Instruction, Instructions, TemplateConfig, Vm, WhitespaceConfig};
use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Rest, ValueKind};
use minijinja::{AutoEscape, Environment, Error, ErrorKind, FormatStyle, Value, format_filter};

/// Instructions of one rendering; a conversation of a thousand messages takes about 300,000.
const FUEL: u64 = 10_000_000;
/// Bytes that one rendering may make, copies on the way included.
const BUDGET: usize = 1 << 30;
/// Bytes of one text.
const MAX_TEXT: usize = 16 << 20;
/// A list, map or namespace counts as so many bytes, which bounds how deep they nest too.
const CONTAINER_BYTES: usize = 8 << 10;
/// Depth of lists and maps that are written as text.
const MAX_DEPTH: usize = 200;
/// Bytes of what is computed while a template is compiled.
const MAX_CONSTANT: usize = 1 << 20;
/// Digits of a width in a format.
const MAX_WIDTH_DIGITS: usize = 6;
/// Dropping nested values takes one frame a level.
const STACK_BYTES: usize = 256 << 20;

thread_local! {
    static LEFT: Cell<usize> = const { Cell::new(0) };
}

/// Takes `bytes` off the rendering's budget.
pub(crate) fn charge(bytes: usize) -> Result<(), Error> {
    let left = LEFT.get();
    if bytes > left || bytes > MAX_TEXT {
        return Err(failed("it makes too much text: the template repeats something without end"));
    }
    LEFT.set(left - bytes);
    Ok(())
}

pub(crate) fn failed(message: impl Into<std::borrow::Cow<'static, str>>) -> Error {
    Error::new(ErrorKind::InvalidOperation, message)
}

fn compile<'a>(source: &'a str) -> Result<CompiledTemplate<'a>, Error> {
    let config = TemplateConfig {
        syntax_config: SyntaxConfig,
        ws_config: WhitespaceConfig { keep_trailing_newline: false, lstrip_blocks: true, trim_blocks: true },
        default_auto_escape: Arc::new(|_| AutoEscape::None),
    };
    let ast = minijinja::machinery::parse(source, "chat_template", config.syntax_config.clone(), config.ws_config)?;
    check_constants(&ast)?;
    drop(ast);
    let mut compiled = CompiledTemplate::new("chat_template", source, &config)?;
    compiled.instructions = patch(&compiled.instructions);
    compiled.blocks = compiled.blocks.iter().map(|(name, block)| (*name, patch(block))).collect();
    Ok(compiled)
}

/// Checks a template's syntax. `explain` sees an error where it is dropped: it may hold values of the template.
///
/// # Errors
/// It is not Jinja, or computes something huge of constants alone.
pub(crate) fn check<E: Send>(source: &str, explain: impl Fn(&Error) -> E + Sync) -> Result<(), E> {
    on_own_stack(&explain, || compile(source).map(|_| ()).map_err(|error| explain(&error)))
}

/// Renders a template with the variables of `root`; `explain` as for [`check`].
///
/// # Errors
/// The template fails, raises, or passes its limits.
pub(crate) fn render<E: Send>(
    environment: &Environment<'_>,
    source: &str,
    root: Value,
    explain: impl Fn(&Error) -> E + Sync,
) -> Result<String, E> {
    let work = move || {
        LEFT.set(BUDGET);
        let compiled = compile(source)?;
        let mut text = String::new();
        let mut output = minijinja::machinery::make_string_output(&mut text);
        let result =
            Vm::new(environment).eval(&compiled.instructions, root, &compiled.blocks, &mut output, AutoEscape::None);
        result.map(|_| ())?;
        Ok(text)
    };
    on_own_stack(&explain, || work().map_err(|error| explain(&error)))
}

fn on_own_stack<T: Send, E: Send>(
    explain: &dyn Fn(&Error) -> E,
    work: impl FnOnce() -> Result<T, E> + Send,
) -> Result<T, E> {
    let result = std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().stack_size(STACK_BYTES).spawn_scoped(scope, work);
        match thread.map(std::thread::ScopedJoinHandle::join) {
            Ok(Ok(result)) => Ok(result),
            Ok(Err(_)) => Err("the template library gave up".to_owned()),
            Err(error) => Err(format!("no thread to render in: {error}")),
        }
    });
    result.unwrap_or_else(|message| Err(explain(&failed(message))))
}

/// The limits and Python's meaning of operators, filters and methods.
pub(crate) fn set_up(environment: &mut Environment<'_>) {
    environment.set_fuel(Some(FUEL));
    environment.add_function("~", concat);
    environment.add_function("+", add);
    environment.add_function("*", multiply);
    environment.add_function("%", remainder);
    environment.add_function("==", |left: &Value, right: &Value| {
        charge_comparison(left, right)?;
        Ok::<_, Error>(left == right)
    });
    environment.add_function("!=", |left: &Value, right: &Value| {
        charge_comparison(left, right)?;
        Ok::<_, Error>(left != right)
    });
    environment.add_function("in", contains);
    environment.add_function("for", |value: Value| match value.kind() {
        ValueKind::None => Err(failed("'NoneType' object is not iterable")),
        _ => Ok(value),
    });
    environment.add_function("[", list);
    environment.add_function("{", map);
    environment.add_function("[:]", slice);
    environment.add_function("dict", |value: Option<Value>, kwargs: Kwargs| {
        charge(CONTAINER_BYTES)?;
        minijinja::functions::dict(value, kwargs)
    });
    environment.add_function("namespace", |value: Option<Value>| {
        charge(CONTAINER_BYTES)?;
        minijinja::functions::namespace(value)
    });
    environment.add_filter("length", length);
    environment.add_filter("count", length);
    environment.add_filter("first", |value: &Value| match value.as_str() {
        Some(text) => Ok(text.chars().next().map_or(Value::UNDEFINED, Value::from)),
        None => items_of(value).map(|items| items.into_iter().next().unwrap_or(Value::UNDEFINED)),
    });
    environment.add_filter("last", |value: &Value| match value.as_str() {
        Some(text) => Ok(text.chars().next_back().map_or(Value::UNDEFINED, Value::from)),
        None => items_of(value).map(|mut items| items.pop().unwrap_or(Value::UNDEFINED)),
    });
    environment.add_filter("items", |value: &Value| match value.kind() {
        ValueKind::Undefined => Ok(Value::from(Vec::<Value>::new())),
        ValueKind::Map => pairs(value),
        kind => Err(failed(format!("Can only get item pairs from a mapping, not from a value of type {kind}"))),
    });
    environment.add_filter("list", |value: &Value| {
        let items = items_of(value)?;
        charge(items.len() * size_of::<Value>() + CONTAINER_BYTES)?;
        Ok::<_, Error>(Value::from(items))
    });
    environment.add_filter("join", join);
    environment.add_filter("replace", |value: &Value, old: &Value, new: &Value, count: Option<i64>| {
        replace(&text(value)?, &text(old)?, &text(new)?, count)
    });
    environment.add_filter("upper", |value: &Value| sized(text(value)?.to_uppercase()));
    environment.add_filter("lower", |value: &Value| sized(text(value)?.to_lowercase()));
    environment.add_filter("trim", |value: &Value, chars: Option<Value>| {
        let value = text(value)?;
        match chars.filter(|chars| !chars.is_none()) {
            None => sized(value.trim_matches(is_python_space).to_owned()),
            Some(chars) => {
                let chars = text(&chars)?;
                sized(value.trim_matches(|c| chars.contains(c)).to_owned())
            }
        }
    });
    environment.add_filter("capitalize", |value: &Value| sized(capitalize(&text(value)?)));
    environment.add_filter("truncate", truncate);
    environment.add_filter("wordcount", |value: &Value| {
        let value = text(value)?;
        let mut count = 0;
        let mut in_word = false;
        for c in value.chars() {
            let is_word = c.is_alphanumeric() || c == '_';
            count += usize::from(is_word && !in_word);
            in_word = is_word;
        }
        Ok::<_, Error>(count)
    });
    environment.add_filter("center", |value: &Value, width: Option<usize>| {
        pad(&text(value)?, width.unwrap_or(80), ' ', Side::Both)
    });
    environment.add_filter("batch", batch);
    environment.add_filter("slice", slices);
    environment.add_filter("indent", indent);
    environment.add_filter("int", |value: &Value, default: Option<Value>, base: Option<u32>| {
        to_int(value, base.unwrap_or(10)).unwrap_or_else(|| default.unwrap_or_else(|| Value::from(0)))
    });
    environment.add_filter("float", |value: &Value, default: Option<Value>| {
        to_float(value).map_or_else(|| default.unwrap_or_else(|| Value::from(0.0)), Value::from)
    });
    environment.add_filter("format", |format: &Value, args: Rest<Value>| printf(&text(format)?, &args));
}

/// Puts calls of Python's operations in the place of minijinja's.
fn patch<'a>(old: &Instructions<'a>) -> Instructions<'a> {
    let mut new = Instructions::new(old.name(), old.source());
    let mut places = Vec::with_capacity(old.len() + 1);
    for i in 0..old.len() as u32 {
        places.push(new.len() as u32);
        let Some(instruction) = old.get(i) else { continue };
        let line = old.get_line(i).unwrap_or(1).min(usize::from(u16::MAX)) as u16;
        let mut push = |instruction| new.add_with_line(instruction, line);
        match instruction {
            // What is written counts.
            Instruction::EmitRaw(text) => {
                push(Instruction::LoadConst(Value::from(*text)));
                push(Instruction::Emit);
            }
            Instruction::PushLoop(flags) => {
                push(Instruction::CallFunction("for", Some(1)));
                push(Instruction::PushLoop(*flags));
            }
            Instruction::StringConcat => _ = push(Instruction::CallFunction("~", Some(2))),
            Instruction::Add => _ = push(Instruction::CallFunction("+", Some(2))),
            Instruction::Mul => _ = push(Instruction::CallFunction("*", Some(2))),
            Instruction::Rem => _ = push(Instruction::CallFunction("%", Some(2))),
            Instruction::Eq => _ = push(Instruction::CallFunction("==", Some(2))),
            Instruction::Ne => _ = push(Instruction::CallFunction("!=", Some(2))),
            Instruction::In => _ = push(Instruction::CallFunction("in", Some(2))),
            Instruction::Slice => _ = push(Instruction::CallFunction("[:]", Some(4))),
            Instruction::BuildList(Some(n)) if u16::try_from(*n).is_ok() => {
                push(Instruction::CallFunction("[", Some(*n as u16)));
            }
            Instruction::BuildMap(n) if u16::try_from(2 * n).is_ok() => {
                push(Instruction::CallFunction("{", Some(2 * *n as u16)));
            }
            other => _ = push(other.clone()),
        }
    }
    places.push(new.len() as u32);
    for i in 0..new.len() as u32 {
        if let Some(
            Instruction::Iterate(to)
            | Instruction::Jump(to)
            | Instruction::JumpIfFalse(to)
            | Instruction::JumpIfFalseOrPop(to)
            | Instruction::JumpIfTrueOrPop(to)
            | Instruction::BuildMacro(_, to, _),
        ) = new.get_mut(i)
        {
            *to = places.get(*to as usize).copied().unwrap_or(*to);
        }
    }
    new
}

/// Refuses constants that compiling would compute to something huge.
fn check_constants(stmt: &Stmt<'_>) -> Result<(), Error> {
    let all = |stmts: &[Stmt<'_>]| stmts.iter().try_for_each(check_constants);
    match stmt {
        Stmt::Template(s) => all(&s.children),
        Stmt::EmitExpr(s) => check_constant(&s.expr),
        Stmt::EmitRaw(_) | Stmt::Continue(_) | Stmt::Break(_) => Ok(()),
        Stmt::ForLoop(s) => {
            check_constant(&s.iter)?;
            s.filter_expr.as_ref().map_or(Ok(()), check_constant)?;
            all(&s.body)?;
            all(&s.else_body)
        }
        Stmt::IfCond(s) => {
            check_constant(&s.expr)?;
            all(&s.true_body)?;
            all(&s.false_body)
        }
        Stmt::WithBlock(s) => {
            s.assignments.iter().try_for_each(|(_, value)| check_constant(value))?;
            all(&s.body)
        }
        Stmt::Set(s) => check_constant(&s.expr),
        Stmt::SetBlock(s) => {
            s.filter.as_ref().map_or(Ok(()), check_constant)?;
            all(&s.body)
        }
        Stmt::AutoEscape(s) => all(&s.body),
        Stmt::FilterBlock(s) => {
            check_constant(&s.filter)?;
            all(&s.body)
        }
        Stmt::Macro(s) => {
            s.defaults.iter().try_for_each(check_constant)?;
            all(&s.body)
        }
        Stmt::CallBlock(s) => {
            check_args(&s.call.args)?;
            all(&s.macro_decl.body)
        }
        Stmt::Do(s) => check_args(&s.call.args),
        Stmt::Block(s) => all(&s.body),
        #[allow(unreachable_patterns, reason = "other features of the library have more")]
        _ => Ok(()),
    }
}

fn check_args(args: &[CallArg<'_>]) -> Result<(), Error> {
    args.iter().try_for_each(|arg| match arg {
        CallArg::Pos(e) | CallArg::Kwarg(_, e) | CallArg::PosSplat(e) | CallArg::KwargSplat(e) => check_constant(e),
    })
}

fn check_constant(expr: &Expr<'_>) -> Result<(), Error> {
    let optional = |expr: &Option<Expr<'_>>| expr.as_ref().map_or(Ok(()), check_constant);
    match expr {
        Expr::Var(_) | Expr::Const(_) => Ok(()),
        Expr::Slice(e) => {
            check_constant(&e.expr)?;
            [&e.start, &e.stop, &e.step].into_iter().try_for_each(optional)
        }
        Expr::UnaryOp(e) => check_constant(&e.expr),
        Expr::BinOp(e) => {
            // Sides first: they are small then.
            check_constant(&e.left)?;
            check_constant(&e.right)?;
            let (Some(left), Some(right)) = (e.left.as_const(), e.right.as_const()) else { return Ok(()) };
            let size = |value: &Value| value.len().unwrap_or(32);
            let times = |value: &Value| value.as_usize().unwrap_or(1);
            let bytes = match e.op {
                BinOpKind::Mul => {
                    (size(&left).saturating_mul(times(&right))).max(size(&right).saturating_mul(times(&left)))
                }
                BinOpKind::Add | BinOpKind::Concat => size(&left) + size(&right),
                _ => 0,
            };
            let is_number = left.is_number() && right.is_number();
            if bytes > MAX_CONSTANT && !is_number {
                return Err(Error::new(ErrorKind::SyntaxError, "a constant is too large"));
            }
            Ok(())
        }
        Expr::Compare(e) => {
            check_constant(&e.expr)?;
            e.ops.iter().try_for_each(|op| check_constant(&op.expr))
        }
        Expr::IfExpr(e) => {
            check_constant(&e.test_expr)?;
            check_constant(&e.true_expr)?;
            optional(&e.false_expr)
        }
        Expr::Filter(e) => {
            optional(&e.expr)?;
            check_args(&e.args)
        }
        Expr::Test(e) => {
            check_constant(&e.expr)?;
            check_args(&e.args)
        }
        Expr::GetAttr(e) => check_constant(&e.expr),
        Expr::GetItem(e) => {
            check_constant(&e.expr)?;
            check_constant(&e.subscript_expr)
        }
        Expr::Call(e) => {
            check_constant(&e.expr)?;
            check_args(&e.args)
        }
        Expr::List(e) => e.items.iter().try_for_each(check_constant),
        Expr::Map(e) => e.keys.iter().chain(&e.values).try_for_each(check_constant),
    }
}

/// `value`, if it is within what a rendering may make.
fn sized(value: String) -> Result<Value, Error> {
    charge(value.len())?;
    Ok(Value::from(value))
}

/// Items as Python's iteration gives them: characters of a string, keys of a map, none of an undefined value.
fn items_of(value: &Value) -> Result<Vec<Value>, Error> {
    match (value.kind(), value.as_str()) {
        (_, Some(text)) => {
            charge(text.len().saturating_mul(size_of::<Value>()).min(MAX_TEXT))?;
            Ok(text.chars().map(Value::from).collect())
        }
        (ValueKind::Undefined, _) => Ok(vec![]),
        (ValueKind::None, _) => Err(failed("'NoneType' object is not iterable")),
        _ => {
            if let Some(n) = value.len() {
                charge(n.saturating_mul(size_of::<Value>()))?;
            }
            let mut items = vec![];
            for item in value.try_iter()? {
                if items.len() % 1024 == 1023 {
                    charge(1024 * size_of::<Value>())?;
                }
                items.push(item);
            }
            Ok(items)
        }
    }
}

fn pairs(value: &Value) -> Result<Value, Error> {
    let keys = items_of(value)?;
    charge(keys.len().saturating_mul(2 * size_of::<Value>()) + CONTAINER_BYTES)?;
    let pair = |key: Value| Ok(Value::from(vec![key.clone(), value.get_item(&key)?]));
    Ok(Value::from(keys.into_iter().map(pair).collect::<Result<Vec<Value>, Error>>()?))
}

fn length(value: &Value) -> Result<usize, Error> {
    match value.kind() {
        ValueKind::Undefined => Ok(0),
        kind => value.len().ok_or_else(|| failed(format!("object of type '{kind}' has no len()"))),
    }
}

/// Comparing long values takes time, if not memory.
fn charge_comparison(left: &Value, right: &Value) -> Result<(), Error> {
    let size = |value: &Value| match value.as_str() {
        Some(text) => text.len(),
        None => value.len().unwrap_or(0).saturating_mul(size_of::<Value>()),
    };
    // Short ones are what instructions are.
    match size(left).min(size(right)) {
        0..256 => Ok(()),
        size => charge(size.min(MAX_TEXT)),
    }
}

/// Python's `in`.
fn contains(value: &Value, container: &Value) -> Result<bool, Error> {
    if let Some(text) = container.as_str() {
        charge(if text.len() < 256 { 0 } else { text.len() })?;
        return match value.as_str() {
            Some(value) => Ok(text.contains(value)),
            None if value.is_undefined() => Ok(text.contains("")),
            None => Err(failed(format!("'in <string>' requires a string, not a value of type {}", value.kind()))),
        };
    }
    match container.kind() {
        ValueKind::Undefined => Ok(false),
        ValueKind::Map => Ok(container.get_item(value).is_ok_and(|found| !found.is_undefined())),
        ValueKind::Seq | ValueKind::Iterable => {
            let n = container.len().unwrap_or(0);
            charge(if n < 64 { 0 } else { n.saturating_mul(size_of::<Value>()).min(MAX_TEXT) })?;
            Ok(container.try_iter()?.any(|item| item == *value))
        }
        kind => Err(failed(format!("a value of type {kind} is not iterable"))),
    }
}

fn concat(left: &Value, right: &Value) -> Result<Value, Error> {
    let (left, right) = (text(left)?, text(right)?);
    charge(left.len() + right.len())?;
    Ok(Value::from(left + &right))
}

fn is_list(value: &Value) -> bool {
    matches!(value.kind(), ValueKind::Seq | ValueKind::Iterable)
}

fn int(value: &Value) -> Option<i128> {
    (value.is_integer() || value.kind() == ValueKind::Bool).then(|| i128::try_from(value.clone()).ok()).flatten()
}

fn float(value: &Value) -> Option<f64> {
    matches!(value.kind(), ValueKind::Number | ValueKind::Bool).then(|| f64::try_from(value.clone()).ok()).flatten()
}

fn number(value: i128) -> Value {
    i64::try_from(value).map_or_else(|_| Value::from(value), Value::from)
}

fn unsupported(operator: &str, left: &Value, right: &Value) -> Error {
    failed(format!("unsupported operand types for {operator}: {} and {}", left.kind(), right.kind()))
}

fn add(left: &Value, right: &Value) -> Result<Value, Error> {
    if let (Some(left), Some(right)) = (left.as_str(), right.as_str()) {
        charge(left.len() + right.len())?;
        return Ok(Value::from([left, right].concat()));
    }
    if is_list(left) && is_list(right) {
        let mut items = items_of(left)?;
        items.extend(items_of(right)?);
        charge(CONTAINER_BYTES)?;
        return Ok(Value::from(items));
    }
    if let (Some(left), Some(right)) = (int(left), int(right)) {
        return left.checked_add(right).map(number).ok_or_else(|| failed("a sum is too large"));
    }
    match (float(left), float(right)) {
        (Some(left), Some(right)) => Ok(Value::from(left + right)),
        _ => Err(unsupported("+", left, right)),
    }
}

fn multiply(left: &Value, right: &Value) -> Result<Value, Error> {
    if let (Some(left), Some(right)) = (int(left), int(right)) {
        return left.checked_mul(right).map(number).ok_or_else(|| failed("a product is too large"));
    }
    if let (Some(left), Some(right)) = (float(left), float(right)) {
        return Ok(Value::from(left * right));
    }
    let (value, times) = if int(right).is_some() { (left, right) } else { (right, left) };
    let times = usize::try_from(int(times).ok_or_else(|| unsupported("*", left, right))?.max(0)).unwrap_or(usize::MAX);
    if let Some(text) = value.as_str() {
        charge(text.len().saturating_mul(times))?;
        return Ok(Value::from(text.repeat(if text.is_empty() { 0 } else { times })));
    }
    if !is_list(value) {
        return Err(unsupported("*", left, right));
    }
    let items = items_of(value)?;
    charge(items.len().saturating_mul(size_of::<Value>()).saturating_mul(times).saturating_add(CONTAINER_BYTES))?;
    Ok(Value::from(if items.is_empty() { vec![] } else { std::iter::repeat_n(items, times).flatten().collect() }))
}

/// Python's `%`: of numbers, with the sign of the divisor; of a string, printf's formats.
fn remainder(left: &Value, right: &Value) -> Result<Value, Error> {
    if let Some(format) = left.as_str() {
        // A tuple is a list here: its items are the arguments if they are as many as the format has.
        let n_wanted = format.replace("%%", "").matches('%').count();
        let items = if is_list(right) { Some(items_of(right)?) } else { None };
        return match items.filter(|items| items.len() == n_wanted) {
            Some(items) => printf(format, &items),
            None => printf(format, std::slice::from_ref(right)),
        };
    }
    if let (Some(left), Some(right)) = (int(left), int(right)) {
        let rest = left.checked_rem(right).ok_or_else(|| failed("integer modulo by zero"))?;
        return Ok(number(if rest != 0 && (rest < 0) != (right < 0) { rest + right } else { rest }));
    }
    match (float(left), float(right)) {
        (Some(_), Some(0.0)) => Err(failed("float modulo by zero")),
        (Some(left), Some(right)) => Ok(Value::from(left - right * (left / right).floor())),
        _ => Err(unsupported("%", left, right)),
    }
}

/// printf's formats as Python fills them in: lists and maps by their text.
fn printf(format: &str, args: &[Value]) -> Result<Value, Error> {
    let mut rest = format;
    while let Some((_, after)) = rest.split_once('%') {
        let spec = after.trim_start_matches(['#', '0', '-', ' ', '+']);
        check_width(&spec[..spec.len().min(40).min(spec.find(|c: char| c.is_alphabetic()).unwrap_or(spec.len()))])?;
        rest = after;
    }
    let args: Vec<Value> = args
        .iter()
        .map(|arg| match arg.kind() {
            ValueKind::Number | ValueKind::String => Ok(arg.clone()),
            ValueKind::Map if format.contains("%(") => Ok(arg.clone()),
            ValueKind::Bool if !format.contains("%s") => Ok(arg.clone()),
            _ => text(arg).map(Value::from),
        })
        .collect::<Result<_, Error>>()?;
    sized(format_filter(FormatStyle::Printf, format, &args)?)
}

/// Refuses what `str.format` would make too much of.
pub(crate) fn check_format(format: &str, args: &[Value]) -> Result<(), Error> {
    let fields = format.split('{').skip(1);
    fields.clone().filter_map(|rest| rest.split('}').next()).try_for_each(check_width)?;
    let mut longest = 0;
    for arg in args {
        longest = longest.max(text(arg)?.len());
    }
    charge(format.len().saturating_add(longest.saturating_mul(fields.count())))
}

/// Refuses formats that pad to millions of characters.
pub(crate) fn check_width(spec: &str) -> Result<(), Error> {
    let mut n_digits = 0;
    for c in spec.chars() {
        n_digits = if c.is_ascii_digit() { n_digits + 1 } else { 0 };
        if n_digits > MAX_WIDTH_DIGITS {
            return Err(failed("a format is too wide"));
        }
    }
    Ok(())
}

fn list(items: Rest<Value>) -> Result<Value, Error> {
    charge(CONTAINER_BYTES)?;
    Ok(Value::from(items.0))
}

fn map(items: Rest<Value>) -> Result<Value, Error> {
    charge(CONTAINER_BYTES)?;
    Ok(items.as_chunks::<2>().0.iter().map(|[key, value]| (key.clone(), value.clone())).collect())
}

/// Python's slices, of strings and lists.
fn slice(value: &Value, start: &Value, stop: &Value, step: &Value) -> Result<Value, Error> {
    let bound = |bound: &Value| match (bound.is_none() || bound.is_undefined(), int(bound)) {
        (true, _) => Ok(None),
        (false, Some(bound)) => Ok(Some(bound)),
        (false, None) => Err(failed("slice indices must be integers or None")),
    };
    let step = bound(step)?.unwrap_or(1);
    if step == 0 {
        return Err(failed("slice step cannot be zero"));
    }
    if value.is_none() || (!is_list(value) && value.as_str().is_none()) {
        return match value.kind() {
            // Jinja2's sandbox gives an undefined value for the missing item.
            ValueKind::Undefined => Ok(Value::from(Vec::<Value>::new())),
            kind => Err(failed(format!("value of type {kind} cannot be sliced"))),
        };
    }
    if let (Some(text), None, 1) = (value.as_str(), bound(stop)?, step)
        && let Some(start @ 0..) = bound(start)?
    {
        let skip = usize::try_from(start).unwrap_or(usize::MAX);
        let tail = text.char_indices().nth(skip).map_or("", |(at, _)| &text[at..]);
        return sized(tail.to_owned());
    }
    let items = items_of(value)?;
    let n = items.len() as i128;
    let clamp = |bound: Option<i128>, default: i128, low: i128, high: i128| match bound {
        None => default,
        Some(bound) if bound < 0 => (bound + n).clamp(low, high),
        Some(bound) => bound.clamp(low, high),
    };
    let (start, stop) = if step > 0 {
        (clamp(bound(start)?, 0, 0, n), clamp(bound(stop)?, n, 0, n))
    } else {
        (clamp(bound(start)?, n - 1, -1, n - 1), clamp(bound(stop)?, -1, -1, n - 1))
    };
    let mut picked = vec![];
    let mut at = start;
    while (step > 0 && at < stop) || (step < 0 && at > stop) {
        if let Some(item) = usize::try_from(at).ok().and_then(|at| items.get(at)) {
            picked.push(item.clone());
        }
        at += step;
    }
    if value.as_str().is_some() {
        return sized(picked.iter().filter_map(Value::as_str).collect());
    }
    charge(CONTAINER_BYTES)?;
    Ok(Value::from(picked))
}

fn join(value: &Value, separator: Option<Value>, options: Kwargs) -> Result<Value, Error> {
    let separator = match separator.or(options.get::<Option<Value>>("d")?) {
        Some(separator) => text(&separator)?,
        None => String::new(),
    };
    let attribute = options.get::<Option<Value>>("attribute")?;
    options.assert_all_used()?;
    let mut out = String::new();
    for (i, item) in items_of(value)?.iter().enumerate() {
        let item = match &attribute {
            Some(name) => item.get_item(name)?,
            None => item.clone(),
        };
        let item = text(&item)?;
        charge(separator.len() + item.len())?;
        if i > 0 {
            out.push_str(&separator);
        }
        out.push_str(&item);
        if out.len() > MAX_TEXT {
            charge(out.len())?;
        }
    }
    Ok(Value::from(out))
}

/// Python's `str.join`.
pub(crate) fn join_method(separator: &str, items: &Value) -> Result<Value, Error> {
    let mut out = String::new();
    for (i, item) in items_of(items)?.iter().enumerate() {
        let item = item.as_str().ok_or_else(|| failed("sequence item: expected str instance"))?;
        charge(separator.len() + item.len())?;
        if i > 0 {
            out.push_str(separator);
        }
        out.push_str(item);
        if out.len() > MAX_TEXT {
            charge(out.len())?;
        }
    }
    Ok(Value::from(out))
}

/// Python's `str.replace`; a count below 0 replaces all.
pub(crate) fn replace(value: &str, old: &str, new: &str, count: Option<i64>) -> Result<Value, Error> {
    let count = count.and_then(|count| usize::try_from(count).ok()).unwrap_or(usize::MAX);
    let n_found = if old.is_empty() { value.chars().count() + 1 } else { value.matches(old).count() };
    charge(value.len().saturating_add(n_found.min(count).saturating_mul(new.len())))?;
    Ok(Value::from(value.replacen(old, new, count)))
}

fn capitalize(value: &str) -> String {
    let mut chars = value.chars();
    match chars.next() {
        Some(first) => first.to_uppercase().chain(chars.flat_map(char::to_lowercase)).collect(),
        None => String::new(),
    }
}

/// Jinja2's `truncate`.
fn truncate(value: &Value, args: Rest<Value>) -> Result<Value, Error> {
    let (args, options) = minijinja::value::from_args::<(&[Value], Kwargs)>(&args)?;
    let value = text(value)?;
    let given = |i: usize, name: &str| -> Result<Option<Value>, Error> {
        Ok(args.get(i).cloned().or(options.get::<Option<Value>>(name)?))
    };
    let size = |i: usize, name: &str, default: usize| -> Result<usize, Error> {
        let size = given(i, name)?.map(|size| size.as_usize().ok_or_else(|| failed(format!("truncate: bad {name}"))));
        size.unwrap_or(Ok(default))
    };
    let length = size(0, "length", 255)?;
    let killwords = given(1, "killwords")?.is_some_and(|killwords| killwords.is_true());
    let end = match given(2, "end")? {
        Some(end) => text(&end)?,
        None => "...".into(),
    };
    let leeway = size(3, "leeway", 5)?;
    options.assert_all_used()?;
    let n_end = end.chars().count();
    if length < n_end {
        return Err(failed(format!("expected length >= {n_end}, got {length}")));
    }
    if value.chars().count() <= length.saturating_add(leeway) {
        return sized(value);
    }
    let kept: String = value.chars().take(length - n_end).collect();
    let kept = if killwords { &kept } else { kept.rsplit_once(' ').map_or(kept.as_str(), |(before, _)| before) };
    sized(format!("{kept}{end}"))
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Side {
    Left,
    Right,
    Both,
}

/// Fills a text up to `width` characters, on the side given.
pub(crate) fn pad(value: &str, width: usize, fill: char, side: Side) -> Result<Value, Error> {
    let missing = width.saturating_sub(value.chars().count());
    charge(value.len().saturating_add(missing.saturating_mul(fill.len_utf8())))?;
    let before = match side {
        Side::Left => missing,
        Side::Right => 0,
        // Python's rule for what does not divide.
        Side::Both => missing / 2 + (missing & width & 1),
    };
    let fill = |n: usize| fill.to_string().repeat(n);
    Ok(Value::from(fill(before) + value + &fill(missing - before)))
}

fn batch(value: &Value, count: usize, fill_with: Option<Value>) -> Result<Value, Error> {
    if count == 0 {
        return Err(failed("batch: the count must be at least 1"));
    }
    let items = items_of(value)?;
    let mut rows: Vec<Vec<Value>> = items.chunks(count).map(<[Value]>::to_vec).collect();
    if let (Some(fill), Some(last)) = (fill_with.filter(|fill| !fill.is_none()), rows.last_mut()) {
        charge((count - last.len()).saturating_mul(size_of::<Value>()))?;
        last.resize(count, fill);
    }
    charge(rows.len().saturating_mul(64).saturating_add(CONTAINER_BYTES))?;
    Ok(Value::from(rows.into_iter().map(Value::from).collect::<Vec<Value>>()))
}

/// Jinja2's `slice`: so many lists of nearly the same length.
fn slices(value: &Value, count: usize, fill_with: Option<Value>) -> Result<Value, Error> {
    if count == 0 {
        return Err(failed("slice: the count must be at least 1"));
    }
    let items = items_of(value)?;
    charge(count.saturating_mul(64).saturating_add(CONTAINER_BYTES))?;
    let (each, more) = (items.len() / count, items.len() % count);
    let mut rest = items.as_slice();
    let mut rows = vec![];
    for i in 0..count {
        let (row, tail) = rest.split_at(each + usize::from(i < more));
        let mut row = row.to_vec();
        if let Some(fill) = fill_with.as_ref().filter(|fill| !fill.is_none() && more > 0 && i >= more) {
            row.push(fill.clone());
        }
        rows.push(Value::from(row));
        rest = tail;
    }
    Ok(Value::from(rows))
}

fn indent(
    value: &Value,
    width: Option<Value>,
    first: Option<bool>,
    blank: Option<bool>,
    options: Kwargs,
) -> Result<Value, Error> {
    let width = match width.or(options.get("width")?) {
        None => " ".repeat(4),
        Some(width) => match (width.as_str(), width.as_usize()) {
            (Some(text), _) => text.to_owned(),
            (None, Some(n)) => {
                charge(n)?;
                " ".repeat(n)
            }
            (None, None) => return Err(failed("indent: the width is neither a number nor a text")),
        },
    };
    let first = first.or(options.get("first")?).unwrap_or(false);
    let blank = blank.or(options.get("blank")?).unwrap_or(false);
    options.assert_all_used()?;
    let value = text(value)?;
    charge(value.len().saturating_add(width.len().saturating_mul(value.matches('\n').count() + 1)))?;
    let mut out = String::new();
    for (i, line) in value.split('\n').enumerate() {
        if i > 0 {
            out.push('\n');
        }
        if if i == 0 { first } else { blank || !line.is_empty() } {
            out.push_str(&width);
        }
        out.push_str(line);
    }
    Ok(Value::from(out))
}

fn to_int(value: &Value, base: u32) -> Option<Value> {
    if let Some(value) = int(value) {
        return Some(number(value));
    }
    if let Some(text) = value.as_str() {
        let text = text.trim().replace('_', "");
        let digits = text.strip_prefix('+').unwrap_or(&text);
        let digits = match base {
            16 => digits.strip_prefix("0x").unwrap_or(digits),
            8 => digits.strip_prefix("0o").unwrap_or(digits),
            2 => digits.strip_prefix("0b").unwrap_or(digits),
            3..=7 | 9..=15 | 17..=36 => digits,
            _ => return None,
        };
        let parsed = i128::from_str_radix(digits, base).ok().map(number);
        return parsed
            .or_else(|| text.parse::<f64>().ok().filter(|v| v.is_finite()).map(|v| number(v.trunc() as i128)));
    }
    float(value).filter(|value| value.is_finite()).map(|value| number(value.trunc() as i128))
}

fn to_float(value: &Value) -> Option<f64> {
    float(value).or_else(|| value.as_str()?.trim().parse().ok())
}

/// What `str.strip` and `str.split` take for white space, which is a little more than Unicode's property.
pub(crate) fn is_python_space(c: char) -> bool {
    c.is_whitespace() || ('\u{1c}'..='\u{1f}').contains(&c)
}

/// Python's `str(value)`, which is what Jinja2 prints.
pub(crate) fn text(value: &Value) -> Result<String, Error> {
    if let Some(text) = value.as_str() {
        return Ok(text.to_owned());
    }
    let mut out = String::new();
    if !value.is_undefined() {
        write_repr(value, &mut out, 0)?;
    }
    charge(out.len())?;
    Ok(out)
}

/// Python's `repr(value)`.
fn write_repr(value: &Value, out: &mut String, depth: usize) -> Result<(), Error> {
    check_depth(out, depth)?;
    match value.kind() {
        ValueKind::None => out.push_str("None"),
        ValueKind::Undefined => out.push_str("Undefined"),
        ValueKind::Bool => out.push_str(if value.is_true() { "True" } else { "False" }),
        ValueKind::Number => {
            out.push_str(&super::chat_template::number_text(value).replace("Infinity", "inf").replace("NaN", "nan"))
        }
        ValueKind::String => out.push_str(&python_quote(value.as_str().unwrap_or_default())),
        ValueKind::Seq | ValueKind::Iterable => {
            let Ok(items) = value.try_iter() else {
                out.push_str(&value.to_string());
                return Ok(());
            };
            out.push('[');
            for (i, item) in items.enumerate() {
                if i > 0 {
                    out.push_str(", ");
                }
                write_repr(&item, out, depth + 1)?;
            }
            out.push(']');
        }
        // A plain dict; objects such as namespace() and loop keep their own words.
        ValueKind::Map => {
            let Ok(keys) = value.try_iter() else {
                out.push_str(&value.to_string());
                return Ok(());
            };
            out.push('{');
            for (i, key) in keys.enumerate() {
                if i > 0 {
                    out.push_str(", ");
                }
                write_repr(&key, out, depth + 1)?;
                out.push_str(": ");
                write_repr(&value.get_item(&key).unwrap_or_default(), out, depth + 1)?;
            }
            out.push('}');
        }
        _ => out.push_str(&value.to_string()),
    }
    Ok(())
}

/// Refuses texts of nested values that would not end.
pub(crate) fn check_depth(out: &str, depth: usize) -> Result<(), Error> {
    if depth > MAX_DEPTH {
        return Err(failed(format!("a value is nested more than {MAX_DEPTH} levels deep")));
    }
    if out.len() > MAX_TEXT {
        charge(out.len())?;
    }
    Ok(())
}

fn python_quote(text: &str) -> String {
    let quote = if text.contains('\'') && !text.contains('"') { '"' } else { '\'' };
    let mut out = String::from(quote);
    for c in text.chars() {
        match c {
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            c if c == quote => out.extend(['\\', c]),
            c if c < ' ' || ('\u{7f}'..'\u{a1}').contains(&c) || c == '\u{ad}' => {
                out.push_str(&format!("\\x{:02x}", u32::from(c)));
            }
            c => out.push(c),
        }
    }
    out.push(quote);
    out
}
