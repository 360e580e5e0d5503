// What a person of js_person.mjs does with encryption: devices and who may read, cross-signing, secret storage and key backup.
import { createHash } from "node:crypto";
import { ClientEvent, Method } from "matrix-js-sdk";
import { CryptoEvent, decodeRecoveryKey, VerificationPhase, VerificationRequestEvent, VerifierEvent } from "matrix-js-sdk/lib/crypto-api/index.js";
import { saw } from "./obey.mjs";

let client, crypto;
let storageKey; // of secret storage, once the person has it
const following = []; // verifications, which the library itself does not keep alive
let comparing; // short strings of a verification, which the person compares
let sharedWith = [];
let hold = null;
let goOn = () => {};

// All requests of the client pass here, so that it can tell what it gives and gets, and be held after a claim of keys.
async function fetchFn(url, options) {
  const path = new URL(url).pathname;
  const answer = await fetch(url, options);
  if (!answer.ok) return answer;
  if (path.endsWith("/sync")) {
    for (const { type, sender, content } of (await answer.clone().json()).to_device?.events ?? []) {
      if (type !== "m.room.encrypted") continue;
      const hash = createHash("sha256").update(JSON.stringify(content.ciphertext)).digest("hex");
      saw({ kind: "to_device", sender, hash });
    }
  } else if (path.includes("/sendToDevice/m.room.encrypted/")) {
    for (const [user, devices] of Object.entries(JSON.parse(options.body).messages))
      sharedWith.push(...Object.keys(devices).map((device) => [user, device]));
  } else if (path.endsWith("/keys/claim")) {
    const keys = [];
    for (const [user, devices] of Object.entries((await answer.clone().json()).one_time_keys))
      for (const [device, found] of Object.entries(devices))
        keys.push(...Object.keys(found).map((key) => [user, device, key]));
    saw({ kind: "claimed", keys });
    await hold;
  }
  return answer;
}

export const cryptoOptions = {
  fetchFn,
  cryptoCallbacks: { getSecretStorageKey: async ({ keys }) => storageKey && [Object.keys(keys)[0], storageKey] },
};

export function watchCrypto(of) {
  client = of;
  crypto = client.getCrypto();
  client.on(CryptoEvent.VerificationRequestReceived, (request) => {
    follow(request);
    request.accept();
  });
  // In a room one's own confirmation comes back, too, with its transaction id.
  const confirmed = (event) => {
    if (event.getType() === "m.key.verification.mac" && !event.getUnsigned().transaction_id) saw({ kind: "confirmed" });
  };
  client.on(ClientEvent.Event, confirmed);
  client.on(ClientEvent.ToDeviceEvent, confirmed);
}

// Takes a verification as far as the short strings, and tells them, so that they can be compared.
function follow(request) {
  following.push(request);
  const user = request.otherUserId;
  let asked = false;
  let verifier;
  const show = (shown) => {
    comparing = shown;
    saw({ kind: "strings", user, strings: shown.sas.decimal.join(" ") });
  };
  const step = () => {
    if (request.phase === VerificationPhase.Ready && request.initiatedByMe && !asked) {
      asked = true;
      request.startVerification("m.sas.v1");
    } else if (request.phase === VerificationPhase.Started && !verifier) {
      verifier = request.verifier;
      verifier.once(VerifierEvent.ShowSas, show);
      verifier.verify().catch((problem) => saw({ kind: "broken", problem: String(problem) }));
    } else if (request.phase === VerificationPhase.Cancelled) {
      saw({ kind: "broken", problem: `a verification was cancelled: ${request.cancellationCode}` });
    } else if (request.phase === VerificationPhase.Done) {
      saw({ kind: "verified", user });
    }
  };
  request.on(VerificationRequestEvent.Change, step);
  // It may have gone on before anybody looked.
  step();
}

export const cryptoCommands = {
  // The next message gets a new key, which must be shared first.
  rotate: ({ room }) => crypto.forceDiscardSession(room),
  pause() {
    hold = new Promise((resolve) => (goOn = resolve));
  },
  go_on: () => goOn(),
  // The devices for which this client would encrypt.
  async knows({ users }) {
    const known = await crypto.getUserDeviceInfo(users, true);
    const others = (user, id) => user !== client.getUserId() || id !== client.getDeviceId();
    const ids = (user) => [...(known.get(user)?.keys() ?? [])].filter((id) => others(user, id)).sort();
    return Object.fromEntries(users.map((user) => [user, ids(user)]));
  },
  // The devices that encrypted messages went to since this was asked last.
  shared_with() {
    const them = sharedWith.sort();
    sharedWith = [];
    return them;
  },

  scroll_back: async ({ room }) => void (await client.scrollback(client.getRoom(room))),

  // Makes keys for cross-signing, which sign this device.
  async sign_devices({ password }) {
    const identifier = { type: "m.id.user", user: client.getUserId() };
    const confirmed = (request) =>
      request(null).catch(({ data }) => request({ type: "m.login.password", identifier, password, session: data.session }));
    await crypto.bootstrapCrossSigning({ setupNewCrossSigning: true, authUploadDeviceSigningKeys: confirmed });
  },
  has_identity: ({ user }) => crypto.userHasCrossSigningKeys(user),
  // Verifies another user in a room of both, or without a room this new device with another device of the user's own.
  async verify({ user, room }) {
    follow(room ? await crypto.requestVerificationDM(user, room) : await crypto.requestOwnUserVerification());
  },
  strings_match: () => comparing.confirm(),
  async is_verified({ user }) {
    return (await crypto.getUserVerificationStatus(user)).isCrossSigningVerified();
  },
  async is_device_verified({ user, device }) {
    const status = await crypto.getDeviceVerificationStatus(user, device);
    return { by_owner: status?.signedByOwner ?? false, by_me: status?.crossSigningVerified ?? false };
  },

  // Puts the secrets into secret storage and begins a backup of the keys of rooms.
  async back_up() {
    const key = await crypto.createRecoveryKeyFromPassphrase();
    storageKey = key.privateKey;
    await crypto.bootstrapSecretStorage({ createSecretStorageKey: async () => key, setupNewKeyBackup: true });
    return { recovery_key: key.encodedPrivateKey };
  },
  async backup() {
    const saved = await client.http.authedRequest(Method.Get, "/room_keys/version");
    return { known: (await crypto.exportRoomKeys()).length, saved: saved.count };
  },
  // All that a new device gets from the recovery key: the secrets, its own signature, the keys of rooms.
  async recover({ recovery_key }) {
    storageKey = decodeRecoveryKey(recovery_key);
    await crypto.userHasCrossSigningKeys(client.getUserId(), true);
    await crypto.bootstrapCrossSigning({});
    await crypto.loadSessionBackupPrivateKeyFromSecretStorage();
    const { total, imported } = await crypto.restoreKeyBackup();
    return { total, imported };
  },
};
