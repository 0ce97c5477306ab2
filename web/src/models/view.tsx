import { useSignal } from "@preact/signals";
import { useEffect, useRef } from "preact/hooks";
import type { Catalogue, CatalogueEntry, Pull } from "../api";
import { connected } from "../api";
import { errorText } from "../errorText";
import { fileSize, language, number, t } from "../i18n";
import { models } from "../chat/state";
import { route } from "../router";
import { cancel, catalogue, problem, pulls, refreshCatalogue, start, chatWith } from "./state";

export function ModelsView() {
  useEffect(() => {
    if (connected.value) void refreshCatalogue();
  }, [connected.value]);
  const all = catalogue.value;
  const none = models.value.every((each) => each.kind !== "chat");
  return (
    <div class="page models">
      <h1>{t(none ? "chooseModel" : "models")}</h1>
      {problem.value && (
        <p class="problem" role="alert">
          {problem.value}
        </p>
      )}
      {all === null ? !problem.value && <p class="note">{t("loading")}</p> : <Lists all={all} />}
    </div>
  );
}

function Lists({ all }: { all: Catalogue }) {
  const proposed = all.data.find((each) => each.name === all.proposed && !each.here);
  const here = all.data.filter((each) => each.here);
  const rest = all.data.filter((each) => !each.here && each !== proposed);
  const room = [
    all.free_memory !== null && t("freeMemory", { size: fileSize(all.free_memory) }),
    all.memory_limit !== null && t("memoryLimit", { size: fileSize(all.memory_limit) }),
    t("freeDisk", { size: fileSize(all.free_disk) }),
  ].filter(Boolean);
  return (
    <>
      <p class="note">
        {t("fetchedOnClick")} {room.join(" · ")}
      </p>
      {proposed && (
        <section class="proposed" aria-labelledby="proposed">
          <h2 id="proposed">{t("proposed")}</h2>
          <p>{t("proposedWhy", { memory: fileSize(proposed.memory ?? 0) })}</p>
          <ul class="models-list">
            <Entry entry={proposed} primary />
          </ul>
        </section>
      )}
      {here.length > 0 && <List title={t("onThisMachine")} entries={here} />}
      {rest.length > 0 && <List title={t("toDownload")} entries={rest} />}
    </>
  );
}

function List(props: { title: string; entries: CatalogueEntry[] }) {
  return (
    <section>
      <h2>{props.title}</h2>
      <ul class="models-list">
        {props.entries.map((entry) => (
          <Entry key={entry.name} entry={entry} />
        ))}
      </ul>
    </section>
  );
}

function Entry({ entry, primary }: { entry: CatalogueEntry; primary?: boolean }) {
  const pull = pulls.value.get(entry.name);
  const item = useRef<HTMLLIElement>(null);
  const isNamed = route.value.id === entry.name; // in the address
  useEffect(() => {
    if (!isNamed) return;
    item.current?.scrollIntoView({ block: "center" });
    item.current?.querySelector("button")?.focus();
  }, [isNamed]);
  return (
    <li ref={item} aria-label={entry.name} class={isNamed ? "named" : ""}>
      <div class="models-text">
        <b>{entry.name}</b>
        <span class="facts">
          {facts(entry).map((each) => (
            <span key={each}>{each}</span>
          ))}
        </span>
        {entry.problem && <span class="note">{t("notUsable", { why: entry.problem })}</span>}
        {entry.fits === false && <span class="warning">{t("mayNotFit")}</span>}
      </div>
      {pull?.state === "running" ? (
        <Progress pull={pull} here={entry.here} />
      ) : (
        <Actions entry={entry} primary={primary} pull={pull} />
      )}
    </li>
  );
}

function Actions({ entry, primary, pull }: { entry: CatalogueEntry; primary: boolean | undefined; pull: Pull | undefined }) {
  const accepted = useSignal(false);
  const { name, served, staged } = entry;
  if (served !== null) {
    return (
      <button type="button" aria-label={t("chatWith", { name })} onClick={() => chatWith(served)}>
        {t("chatNow")}
      </button>
    );
  }
  if (entry.problem) return null;
  const needsLicence = entry.limited && !entry.here;
  const label = entry.here ? t("use") : staged ? t("resume") : t("download");
  return (
    <div class="models-actions">
      {pull?.state === "failed" && (
        <p class="problem" role="alert" title={pull.error ?? undefined}>
          <span>
            {pullError(pull)} {pull.code === "no_network" && otherSources(entry)}
          </span>
          <button type="button" class="quiet" onClick={() => void cancel(name)}>
            {t("dismiss")}
          </button>
        </p>
      )}
      {staged > 0 && <span class="note">{t("partlyHere", { size: fileSize(staged) })}</span>}
      {needsLicence && (
        <label class="check">
          <input
            type="checkbox"
            checked={accepted.value}
            onChange={(event) => (accepted.value = event.currentTarget.checked)}
          />
          <span>{t("acceptLicence", { licence: entry.licence ?? "" })}</span>
        </label>
      )}
      <button
        type="button"
        class={primary ? "primary" : ""}
        aria-label={`${label}: ${name}`}
        disabled={needsLicence && !accepted.value}
        onClick={() => void start(entry, accepted.value)}
      >
        {entry.here ? label : `${label} · ${fileSize(entry.bytes - staged)}`}
      </button>
      {staged > 0 && (
        <button type="button" class="quiet" aria-label={`${t("discard")}: ${name}`} onClick={() => void cancel(name, true)}>
          {t("discard")}
        </button>
      )}
    </div>
  );
}

function Progress({ pull, here }: { pull: Pull; here: boolean }) {
  const whole = here || pull.bytes >= pull.total;
  const parts = whole
    ? [t("checkingModel")]
    : [
        t("receivedOf", { n: fileSize(pull.bytes), of: fileSize(pull.total) }),
        pull.rate ? `${fileSize(pull.rate)}/s` : null,
        pull.remaining !== null && pull.remaining < 360_000 ? t("timeLeft", { time: duration(pull.remaining) }) : null,
        pull.source ? t("fromSource", { source: pull.source }) : null,
      ];
  return (
    <div class="models-progress">
      <progress max={pull.total} value={whole ? undefined : pull.bytes} aria-label={t("downloadOf", { name: pull.name })} />
      <span class="note">{parts.filter(Boolean).join(" · ")}</span>
      <button type="button" aria-label={`${t("cancel")}: ${pull.name}`} onClick={() => void cancel(pull.name)}>
        {t("cancel")}
      </button>
    </div>
  );
}

/** Size, memory, licence and what it can do, in short pieces. */
function facts(entry: CatalogueEntry): string[] {
  const memory = entry.memory === null ? null : fileSize(entry.memory);
  const pieces = [
    fileSize(entry.bytes),
    memory && t(entry.memory_is_whole ? "needsMemory" : "needsMoreThan", { size: memory }),
    entry.licence && t(entry.limited ? "licenceLimited" : "licenceIs", { licence: entry.licence }),
    entry.languages && languages(entry.languages),
    entry.thinking && entry.thinking !== "no" && t(entry.thinking === "always" ? "thinksAlways" : "thinksSwitch"),
    entry.kind === "translation" && t("translates"),
    entry.origin !== "catalogue" && ORIGINS[entry.origin]?.(),
  ];
  return pieces.filter((each) => typeof each === "string" && each !== "") as string[];
}

const ORIGINS: Record<string, () => string> = {
  trained: () => t("trainedHere"),
  pulled: () => t("pulledHere"),
  ollama: () => "Ollama",
  lmstudio: () => "LM Studio",
  hub: () => "Hugging Face",
};

/** "zh, en, 6 others" of the catalogue, in the page's language. */
function languages(text: string): string {
  const words = text.split(", ").map((word) => {
    const others = word.match(/^(\d+) others$/);
    if (others) return t("otherLanguages", { n: others[1]! });
    if (word === "many") return t("manyLanguages");
    if (word === "code") return t("programCode");
    const [code = "", weak] = word.split(" ");
    const name = code === "zh" ? t("inChinese") : code === "en" ? t("inEnglish") : code;
    return weak === "weak" ? t("weakIn", { language: name }) : name;
  });
  return words.join(language.value === "zh" ? "、" : ", ");
}

function duration(seconds: number): string {
  if (seconds < 60) return t("inSeconds", { n: number(Math.max(1, Math.round(seconds))) });
  if (seconds < 5400) return t("inMinutes", { n: number(Math.round(seconds / 60)) });
  return t("inHours", { n: number(seconds / 3600, 1) });
}

/** Models that come by pip, where the hubs of this one cannot be reached. */
function otherSources(entry: CatalogueEntry): string {
  if (entry.sources.includes("pip")) return "";
  const names = (catalogue.value?.data ?? []).filter((each) => !each.here && each.sources.includes("pip"));
  return names.length ? t("otherSource", { names: names.map((each) => each.name).join(", ") }) : "";
}

function pullError(pull: Pull): string {
  switch (pull.code) {
    case "no_network":
      return t("noNetwork");
    case "disk_full":
      return t("diskFull");
    case "wrong_hash":
      return t("wrongHash");
    case "being_pulled":
      return t("beingPulled");
    case "not_allowed":
      return t("notAllowed");
    case "memory_limit":
      return t("beyondLimit");
  }
  return errorText(pull.error ?? "", pull.code);
}
