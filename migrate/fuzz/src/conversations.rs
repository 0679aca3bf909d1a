//! Scripts to begin with for the state machines: what one side hears in migrations that go well, that break and go on, and that
//! are decided by a witness.

use crate::script::step;
use crate::source_side::steps as s;
use crate::target_side::steps as t;

/// One message of any bytes: the type, and the body that stands behind a header of 16 bytes.
fn raw(message: &[u8]) -> Option<Vec<u8>> {
    let (header, body) = message.split_first_chunk::<16>()?;
    let length = u8::try_from(body.len()).ok()?;
    Some([&[step(t::RAW, 0), header[6], length], body].concat())
}

/// Each step as it is where all is well, or in the way that is given.
fn script(config: [u8; 2], steps: &[(u8, u8)]) -> Vec<u8> {
    config.into_iter().chain(steps.iter().map(|&(what, how)| step(what, how))).collect()
}

/// `steps` as they are where all is well.
fn well<const N: usize>(steps: [u8; N]) -> [(u8, u8); N] {
    steps.map(|what| (what, 0))
}

/// What a target hears. `messages` are put into it as they are.
#[must_use]
pub fn of_target(messages: &[Vec<u8>]) -> Vec<Vec<u8>> {
    let receiving = well([t::HELLO, t::DESCRIBE, t::KEEP_FOR, t::REHEARSE, t::FENCE, t::FENCE]);
    let prepared = well([t::STOPPING, t::STATE, t::PREPARE, t::FENCE, t::PREPARE]);
    let broken = well([t::DISCONNECTED, t::CONNECTED, t::RESUME, t::FENCE]);
    let run = well([t::COMMIT, t::COMMIT, t::RELEASED]);
    let mut seeds = Vec::new();
    let mut add = |config, parts: &[&[(u8, u8)]]| seeds.push(script(config, &parts.concat()));
    add([0, 0], &[&receiving, &prepared, &run]);
    add([0, 0], &[&receiving, &[(t::ARRIVED, 3)], &broken, &prepared, &broken, &prepared, &run]);
    add(
        [0, 0],
        &[&receiving, &well([t::STREAM_FAILED, t::TIMEOUT, t::CONNECTED, t::RESUME]), &prepared, &run],
    );
    add([0, 0], &[&receiving, &prepared, &[(t::FAIL, 0)], &run, &well([t::TIMEOUT])]);
    add([0, 0], &[&receiving, &prepared, &[(t::FAIL, 4)], &run, &well([t::TIMEOUT]), &run]);
    add([0, 0], &[&receiving, &prepared, &[(t::FAIL, 4)], &run, &well([t::PONG]), &run]);
    add([0, 0], &[&receiving, &prepared, &[(t::FAIL, 5)], &run]);
    add([0, 0], &[&receiving, &prepared, &well([t::DISCONNECTED, t::CONNECTED]), &run]);
    add([0, 0], &[&receiving, &prepared, &well([t::DISCONNECTED, t::TIMEOUT])]);
    // With a witness, and one that is not there.
    let receiving: Vec<_> = [&receiving[..1], &well([t::WITNESS_NAMED]), &receiving[1..]].concat();
    add([2, 0], &[&receiving, &prepared, &run]);
    add([2, 0], &[&receiving, &prepared, &[(t::FAIL, 6)], &run[..1], &well([t::TIMEOUT, t::RELEASED])]);
    add([2, 0], &[&receiving, &prepared, &well([t::TAKE_BACK]), &run]);
    let given_up = [(t::COMMIT, 0), (t::PONG, 0), (t::FAIL, 6), (t::TIMEOUT, 0), (t::TIMEOUT, 0)];
    for fails in [0, 4] {
        add([2, 0], &[&receiving, &prepared, &[(t::FAIL, fails)], &given_up]);
        // Each answer by itself, so that what comes between is heard.
        let slowly =
            [(t::FAIL, fails), (t::AT_ONCE, 1), (t::COMMIT, 0), (t::ANSWER_OTHER, 0), (t::ANSWER, 0)];
        let between = [(t::ANSWER, 0), (t::PONG, 0), (t::ANSWER, 0), (t::ANSWER_OTHER, 0), (t::ANSWER, 0)];
        add([2, 0], &[&receiving, &prepared, &slowly, &between]);
        add([2, 0], &[&receiving, &prepared, &slowly, &between[..2], &well([t::RELEASED]), &between]);
    }
    // Memory that is handed over.
    add([1, 0], &[&well([t::HELLO, t::HAND_OVER]), &prepared, &run]);
    // A source that asks after what was.
    for record in 0..8 {
        add([0, record], &[&[(t::HELLO, 1)]]);
        add([0, record], &[&receiving, &prepared, &run]);
    }
    // Each message as it is on the wire, at three places.
    let places = [script([0, 0], &[]), script([0, 0], &receiving), script([0, 0], &[])];
    seeds.extend(
        messages
            .iter()
            .filter_map(|message| raw(message))
            .flat_map(|message| places.each_ref().map(|before| [before.as_slice(), &message].concat())),
    );
    seeds
}

/// What a source hears. `messages` are put into it as they are.
#[must_use]
pub fn of_source(messages: &[Vec<u8>]) -> Vec<Vec<u8>> {
    let copying = well([s::WELCOME, s::ADMIT, s::READY, s::PONG, s::REHEARSED, s::FENCE_REACHED]);
    let again = [(s::DIRTY, 4), (s::PONG, 0), (s::REHEARSED, 0), (s::FENCE_REACHED, 0), (s::TIMEOUT, 0)];
    let broken = [(s::DISCONNECTED, 0), (s::ADMIT, 0), (s::ARRIVED, 2)];
    let lost = well([s::DISCONNECTED, s::PASS, s::TIMEOUT]);
    let mut seeds = Vec::new();
    let mut add = |config, parts: &[&[(u8, u8)]]| seeds.push(script(config, &parts.concat()));
    for config in [[0, 0], [4, 0], [16, 1], [32, 2], [0, 4], [0, 12], [2, 0]] {
        let rounds: Vec<_> = [&copying[..], &again, &again, &again].concat();
        add(config, &[&rounds, &well([s::PREPARED, s::RUNNING])]);
        add(config, &[&rounds, &well([s::PREPARED, s::DISCARDED])]);
        add(config, &[&rounds, &well([s::PREPARED]), &lost, &lost, &[(s::RESOLVE, 0)]]);
        add(config, &[&rounds, &well([s::PREPARED]), &lost, &lost, &[(s::RESOLVE, 1)]]);
        add(config, &[&rounds, &broken, &copying[3..], &again, &again, &well([s::PREPARED, s::RUNNING])]);
        let claimed = well([s::PREPARED, s::TARGET_CLAIMS]);
        add(config, &[&rounds, &claimed, &lost, &lost, &lost]);
        add(
            config,
            &[&copying[..5], &[(s::DISCONNECTED, 0), (s::ARRIVED, 3), (s::ARRIVED, 4)], &copying[3..]],
        );
        add(config, &[&copying, &[(s::STREAM_FAILED, 0), (s::TIMEOUT, 0), (s::ARRIVED, 0)], &copying[3..]]);
        add(config, &[&rounds, &[(s::FAIL, 0), (s::PREPARED, 0)]]);
        add(config, &[&rounds, &[(s::AT_ONCE, 1), (s::PREPARED, 0), (s::DISCONNECTED, 0), (s::ANSWER, 0)]]);
    }
    // The link breaks while each job of the host is under way.
    let whole: Vec<_> = [&copying[..], &again, &again, &well([s::PREPARED])].concat();
    let back = [(s::DISCONNECTED, 0), (s::AT_ONCE, 0), (s::ADMIT, 0), (s::ARRIVED, 1), (s::DIRTY, 4)];
    for (heard, done) in (2..whole.len()).flat_map(|heard| (0..5).map(move |done| (heard, done))) {
        let slowly: Vec<_> = well([s::ANSWER_OTHER, s::ANSWER]).repeat(done);
        let (before, next) = whole.split_at(heard);
        add([0, 0], &[before, &[(s::AT_ONCE, 1)], &next[..1], &slowly, &back, &again, &again, &next[1..]]);
    }
    // Memory that is handed over.
    let offered = [(s::WELCOME, 0), (s::READY, 0), (s::PONG, 5), (s::PREPARED, 0), (s::RUNNING, 0)];
    add([1, 0], &[&offered]);
    let places = [script([0, 0], &[]), script([0, 0], &copying)];
    seeds.extend(
        messages
            .iter()
            .filter_map(|message| raw(message))
            .flat_map(|message| places.each_ref().map(|before| [before.as_slice(), &message].concat())),
    );
    seeds
}
