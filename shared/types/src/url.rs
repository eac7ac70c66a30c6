//! Passwords within URLs, which are for no log, error or dump.

/// What stands in a password's place.
const HIDDEN: &str = "***";
/// A query key that has one of these in it holds a secret: `password`, `sslpassword`, `passwd`, `access_token`.
const SECRET_KEYS: &[&str] = &["pass", "pwd", "secret", "token"];

/// The URL with its passwords hidden, those of its user part and those of its query; any other text as it is.
pub fn without_passwords(text: &str) -> String {
    let Some((scheme, rest)) = text.split_once("://") else { return text.to_owned() };
    let rest = without_query_secrets(rest);
    // A password may hold a raw '/', '?' or '@'; hiding more than it is better than less.
    let hidden = rest.rsplit_once('@').and_then(|(login, host)| {
        let (user, _) = login.split_once(':')?;
        Some(format!("{user}:{HIDDEN}@{host}"))
    });
    format!("{scheme}://{}", hidden.unwrap_or(rest))
}

/// Whether a query key, which may be percent-encoded and in any case, names a secret.
pub fn is_secret_key(key: &str) -> bool {
    let key = decoded(key).to_lowercase();
    SECRET_KEYS.iter().any(|secret| key.contains(secret))
}

fn without_query_secrets(rest: &str) -> String {
    let Some((before, query)) = rest.split_once('?') else { return rest.to_owned() };
    let hide = |pair: &str| match pair.split_once('=') {
        Some((key, _)) if is_secret_key(key) => format!("{key}={HIDDEN}"),
        _ => pair.to_owned(),
    };
    let pairs: Vec<String> = query.split('&').map(hide).collect();
    format!("{before}?{}", pairs.join("&"))
}

fn decoded(text: &str) -> String {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((first, tail)) = rest.split_first() {
        let pair = tail.get(..2).and_then(|pair| std::str::from_utf8(pair).ok());
        match pair.and_then(|pair| u8::from_str_radix(pair, 16).ok()).filter(|_| *first == b'%') {
            Some(byte) => {
                bytes.push(byte);
                rest = &tail[2..];
            }
            None => {
                bytes.push(*first);
                rest = tail;
            }
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_password_is_hidden_wherever_a_url_has_one() {
        for url in [
            "postgres://ada:canary@db:5432/x",
            "postgres://ada:ca@c/canary@db/x",
            "postgres://ada:p?canary@db/x",
            "postgres://ada:p%40canary@db/x?sslmode=require",
            "postgres://db/x?password=canary",
            "postgres://db:5432/x?user=ada&PassWord=canary&sslmode=require",
            "postgres://db/x?sslpassword=canary",
            "postgres://db/x?p%61ssword=canary",
            "postgres://db/x?password=%63canary",
            "postgres://ada@db/x?password=a@b:canary",
            "postgres://ada:p?canary@db/x?password=canary",
            "postgres:///x?host=/run&password=canary?x",
            "nats://relay:canary@bus:4222",
            "https://api/v1?api_token=canary",
        ] {
            let shown = without_passwords(url);
            assert!(!shown.contains("canary") && shown.contains("***"), "{url} is shown as {shown}");
        }
    }

    #[test]
    fn what_is_no_password_stays() {
        for text in ["postgres://ada@db/x", "postgres:///x?host=/run", "plain text: with@colon", "?password=no-url"] {
            assert_eq!(without_passwords(text), text);
        }
        assert_eq!(without_passwords("postgres://ada:secret@db:5432/x"), "postgres://ada:***@db:5432/x");
        assert_eq!(
            without_passwords("postgres://db/x?password=a&sslmode=require"),
            "postgres://db/x?password=***&sslmode=require"
        );
    }
}
