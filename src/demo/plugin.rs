//! Runs a CNI plugin the way a container runtime does: environment, configuration on stdin.

use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

use super::netns::Netns;
use super::topology::{POD_LINK, Pod};

/// A verb that takes longer than this is ended.
const DEADLINE: Duration = Duration::from_secs(60);
/// How often a running process is looked at.
const POLL: Duration = Duration::from_millis(1);

/// What a runtime says about an attachment in the environment.
#[derive(Debug, Clone)]
pub struct Attachment {
    pub container_id: String,
    /// `CNI_NETNS`: a path, or empty.
    pub netns: PathBuf,
    pub ifname: String,
    /// `CNI_ARGS`: `KEY=VALUE` pairs separated by semicolons.
    pub args: String,
}

impl Attachment {
    /// The attachment of a laboratory pod, with the identity that a kubelet's runtime would pass.
    #[must_use]
    pub fn of(pod: &Pod, container_id: &str) -> Self {
        Self {
            container_id: container_id.to_owned(),
            netns: pod.netns.path(),
            ifname: POD_LINK.to_owned(),
            args: format!(
                "IgnoreUnknown=1;K8S_POD_NAMESPACE=demo;K8S_POD_NAME={};K8S_POD_UID=uid-{}",
                pod.name, pod.name
            ),
        }
    }
}

/// What a process left behind.
#[derive(Debug, Clone)]
pub struct Output {
    /// The exit code; `None` if a signal ended it, as the deadline does.
    pub status: Option<i32>,
    pub stdout: String,
    pub stderr: String,
    /// From its start to its end.
    pub took: Duration,
}

impl Output {
    /// Whether it exited with 0.
    #[must_use]
    pub fn success(&self) -> bool {
        self.status == Some(0)
    }

    /// One line that says why it failed: the CNI error on stdout, else what it wrote.
    #[must_use]
    pub fn reason(&self) -> String {
        let error: Option<Value> = serde_json::from_str(&self.stdout).ok();
        let field = |name: &str| {
            let text = error.as_ref()?.get(name)?.as_str()?;
            (!text.is_empty()).then(|| text.to_owned())
        };
        match (field("msg"), field("details"), self.status) {
            (Some(msg), Some(details), _) => format!("{msg}: {details}"),
            (Some(msg), None, _) => msg,
            (None, _, Some(status)) => {
                format!("exit status {status}: {} {}", self.stdout.trim(), self.stderr.trim())
            }
            (None, _, None) => "ended by a signal or the deadline".to_owned(),
        }
    }
}

/// Runs `plugin` with one verb inside a namespace; see [`command`].
pub fn invoke(
    plugin: &Path,
    verb: &str,
    config: &Value,
    attachment: &Attachment,
    inside: &Netns,
) -> io::Result<Output> {
    let mut command = command(plugin, verb, attachment);
    run(&mut command, config.to_string().as_bytes(), inside)
}

/// The plugin's command line for one verb. All six CNI variables are set, unused ones empty, as
/// libcni does it; of the caller's environment only `PATH` goes along.
#[must_use]
pub fn command(plugin: &Path, verb: &str, attachment: &Attachment) -> Command {
    let mut command = Command::new(plugin);
    command
        .env_clear()
        .env("PATH", std::env::var_os("PATH").unwrap_or_default())
        .env("CNI_COMMAND", verb)
        .env("CNI_CONTAINERID", &attachment.container_id)
        .env("CNI_NETNS", &attachment.netns)
        .env("CNI_IFNAME", &attachment.ifname)
        .env("CNI_ARGS", &attachment.args)
        .env("CNI_PATH", plugin.parent().unwrap_or(Path::new("/")));
    command
}

/// Runs any program inside a namespace, with `input` on its stdin, for at most a minute.
pub fn run(command: &mut Command, input: &[u8], inside: &Netns) -> io::Result<Output> {
    let start = Instant::now();
    let mut child = inside
        .spawn(command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()))?;
    let (stdin, stdout, stderr) = (child.stdin.take(), child.stdout.take(), child.stderr.take());
    // All three pipes at once: a program may fill one before it reads or closes another.
    std::thread::scope(|scope| {
        scope.spawn(move || {
            // A program that does not read its input is no failure of ours.
            stdin.map(|mut pipe| pipe.write_all(input).ok());
        });
        let stdout = scope.spawn(move || drain(stdout));
        let stderr = scope.spawn(move || drain(stderr));
        let status = wait(&mut child, start + DEADLINE)?;
        let took = start.elapsed();
        let text = |drained: std::thread::Result<String>| drained.unwrap_or_default();
        Ok(Output { status, stdout: text(stdout.join()), stderr: text(stderr.join()), took })
    })
}

/// The caller's `PATH` and the directories of administration tools, which a user's may lack.
#[must_use]
pub fn search_path() -> String {
    let path = std::env::var("PATH").unwrap_or_default();
    format!("{path}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")
        .trim_start_matches(':')
        .to_owned()
}

fn wait(child: &mut Child, deadline: Instant) -> io::Result<Option<i32>> {
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(status.code());
        }
        if Instant::now() > deadline {
            child.kill()?;
            return Ok(child.wait()?.code());
        }
        std::thread::sleep(POLL);
    }
}

fn drain(pipe: Option<impl Read>) -> String {
    let mut bytes = Vec::new();
    if let Some(mut pipe) = pipe {
        pipe.read_to_end(&mut bytes).ok();
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn output(status: Option<i32>, stdout: &str) -> Output {
        Output {
            status,
            stdout: stdout.to_owned(),
            stderr: "on stderr\n".to_owned(),
            took: Duration::ZERO,
        }
    }

    #[test]
    fn a_reason_is_the_cni_error_where_there_is_one() {
        let error = r#"{"code":7,"msg":"bad hostPort","details":"0"}"#;
        assert_eq!(output(Some(1), error).reason(), "bad hostPort: 0");
        assert_eq!(output(Some(1), r#"{"msg":"bad"}"#).reason(), "bad");
        assert_eq!(output(Some(2), "").reason(), "exit status 2:  on stderr");
        assert!(output(None, "").reason().contains("signal"));
    }
}
