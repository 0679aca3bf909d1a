//! A source whose data streams can't prove themselves, as an older one's, is not let in by a target that wants proof.

use ferry_protocol::admission::JoinSecret;
use ferry_protocol::message::{AbortCode, Describe, Hello, Welcome};
use ferry_protocol::negotiation::Features;
use ferry_protocol::target::{Action, Config, Event, Target};
use ferry_protocol::{Epoch, Message, MigrationId, Region, Timestamp, VmId};

/// What the target answers to a source with these features that describes its machine.
fn answers(features: Features, wants_proof: bool) -> Vec<Action> {
    let config = Config {
        host: "b".into(),
        source: "a".into(),
        carries_descriptors: false,
        name: None,
        record: None,
        witness: None,
    };
    let now = Timestamp::from_origin(std::time::Duration::ZERO);
    let mut target = Target::new(config, now);
    if wants_proof {
        target = target.with_admission(JoinSecret([1; 32]));
    }
    let hello = Hello {
        version_oldest: 1,
        version_newest: 1,
        features,
        migration: MigrationId([1; 16]),
        vm: VmId([2; 16]),
        name: "web".parse().unwrap(),
        epoch: Epoch::new(1),
        resumes: false,
    };
    let regions = vec![Region { gpa: 0, bytes: 1 << 20 }];
    target.handle(now, Event::Message(Message::Hello(hello)));
    let describe = Describe { description: vec![1], regions, streams: 1 };
    target.handle(now, Event::Message(Message::Describe(describe)));
    std::iter::from_fn(|| target.poll_action()).collect()
}

#[test]
fn proof_is_asked_for_by_name() {
    let refused = |actions: &[Action]| {
        actions.iter().any(|action| {
            matches!(action, Action::Send(Message::Abort(abort))
                if abort.code == AbortCode::Version && abort.sentence.contains("prove"))
        })
    };
    let older = Features::OURS.without(Features::ADMISSION);
    assert!(refused(&answers(older, true)));
    assert!(!refused(&answers(Features::OURS, true)));
    assert!(!refused(&answers(older, false)));
    let welcomed = |actions: &[Action]| {
        actions.iter().any(|action| {
            matches!(action, Action::Send(Message::Welcome(Welcome { features, .. })) if features.contains(Features::ADMISSION))
        })
    };
    assert!(welcomed(&answers(Features::OURS, true)));
}
