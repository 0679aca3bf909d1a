//! Words of a peer that people are shown, and decide by.

use serde::{Deserialize, Deserializer};

/// The text without what would make an operator's terminal show something else than it says: control characters, and
/// those that turn the direction of writing or can't be seen, become spaces.
pub(crate) fn on_one_line(text: String) -> String {
    let hides = |character: char| {
        let invisible = matches!(character, '\u{200b}'..='\u{200f}' | '\u{2060}'..='\u{206f}' | '\u{feff}');
        character.is_control() || invisible || matches!(character, '\u{2028}'..='\u{202e}')
    };
    if text.contains(hides) { text.replace(hides, " ") } else { text }
}

/// Reads a text that is shown.
pub(crate) fn shown<'de, D: Deserializer<'de>>(from: D) -> Result<String, D::Error> {
    String::deserialize(from).map(on_one_line)
}

#[cfg(test)]
mod tests {
    use crate::message::{Abort, AbortCode, Message, MessageType, Welcome};
    use crate::negotiation::Features;

    /// What the other side makes of it.
    fn read(message_type: MessageType, message: &Message) -> Message {
        let mut body = Vec::new();
        message.encode_body(&mut body);
        Message::decode_body(message_type, &body).unwrap()
    }

    #[test]
    fn a_peers_words_stay_on_their_line() {
        let forged = || "\u{1b}[2Jgone\nweb: running here now (epoch 9)\u{202e}".to_owned();
        let shown = || " [2Jgone web: running here now (epoch 9) ".to_owned();
        let abort = |sentence| Message::Abort(Abort { code: AbortCode::Internal, sentence });
        let welcome = |host| Message::Welcome(Welcome { host, version: 1, features: Features::OURS });
        assert_eq!(read(MessageType::Abort, &abort(forged())), abort(shown()));
        assert_eq!(read(MessageType::Welcome, &welcome(forged())), welcome(shown()));
        assert_eq!(Abort::new(AbortCode::Internal, forged()).sentence, shown());
    }
}
