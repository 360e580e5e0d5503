//! The program that encrypts (`tests/clients/olm`), which holds the keys and sessions of all devices of a world.

use std::{
    cell::RefCell,
    io::{BufRead, BufReader, Write},
    process::{Child, ChildStdin, ChildStdout, Command, Stdio},
};

use federation::json::Json;
use serde_json::{Value, json};

/// A running program. It is asked one thing at a time, and no time of the world passes meanwhile.
pub(super) struct Olm {
    child: Child,
    lines: RefCell<(ChildStdin, BufReader<ChildStdout>)>,
}

impl Olm {
    pub(super) fn start() -> Self {
        let program = std::env::var("AQUEDUCT_OLM")
            .unwrap_or_else(|why| panic!("AQUEDUCT_OLM is the path of the program that encrypts; tests/clients/olm/run builds it: {why:?}"));
        let mut child = Command::new(program)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap_or_else(|why| panic!("the program that encrypts does not start: {why:?}"));
        let lines = (child.stdin.take().unwrap(), BufReader::new(child.stdout.take().unwrap()));
        Self { child, lines: RefCell::new(lines) }
    }

    /// Has a device do something; answers what comes of it, or why it could not be done.
    pub(super) fn try_to(&self, who: &str, action: &str, mut request: Value) -> Result<Value, String> {
        request["who"] = who.into();
        request["do"] = action.into();
        let mut lines = self.lines.borrow_mut();
        writeln!(lines.0, "{request}").unwrap();
        lines.0.flush().unwrap();
        let mut line = String::new();
        lines.1.read_line(&mut line).unwrap();
        let answer: Value = serde_json::from_str(&line).unwrap();
        match answer["error"].as_str() {
            Some(why) => Err(why.to_owned()),
            None => Ok(answer),
        }
    }

    /// Has a device do something that must succeed.
    pub(super) fn ask(&self, who: &str, action: &str, request: Value) -> Value {
        let shown = request.clone();
        self.try_to(who, action, request).unwrap_or_else(|why| panic!("{who}, {action} {shown}: {why}"))
    }

    /// The object with a signature of a device, under its user and id.
    pub(super) fn signed(&self, who: &str, (user, device): (&str, &str), mut object: Value) -> Value {
        let text = signed_part(&object);
        let signature = self.ask(who, "sign", json!({ "text": text }))["signature"].clone();
        object["signatures"] = json!({ user: { format!("ed25519:{device}"): signature } });
        object
    }

    /// Whether an object has the signature of the device with this key.
    pub(super) fn is_signed(&self, (user, device, key): (&str, &str, &str), object: &Value) -> bool {
        let signature = object["signatures"][user][format!("ed25519:{device}")].clone();
        let request = json!({ "key": key, "signature": signature, "text": signed_part(object) });
        self.try_to("nobody", "verify", request).is_ok()
    }
}

fn signed_part(object: &Value) -> String {
    Json::parse(object.to_string().as_bytes()).unwrap().signed_part().as_str().to_owned()
}

impl Drop for Olm {
    fn drop(&mut self) {
        drop(self.child.kill());
        drop(self.child.wait());
    }
}
