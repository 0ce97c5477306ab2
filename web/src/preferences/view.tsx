import { useSignal } from "@preact/signals";
import { useEffect, useRef } from "preact/hooks";
import { isComposing } from "../chat/composer";
import { model, models, selectModel } from "../chat/state";
import { Icon } from "../components/icons";
import { Markdown } from "../components/markdown";
import { list, number, t } from "../i18n";
import { copyText } from "../platform";
import { isComplete, move, promptsOf, put, rankedAnswers, rankOf, toggleTie, without } from "./ranking";
import {
  agreement, annotator, cancelRound, changeAnnotator, comparable, compared, count, download, file, loadAgreement, problem, progress,
  progressText, prompt, promptQueue, rankNext, ranking, refreshCount, round, sample, sampling, save,
  setAnnotator, skip, startPrompts, status, system, takeBack, takeNext, tied,
} from "./state"; // prettier-ignore

export function PreferencesView() {
  useEffect(() => {
    void refreshCount();
    addEventListener("keydown", onKey);
    return () => {
      removeEventListener("keydown", onKey);
      cancelRound();
    };
  }, []);
  return (
    <div class="page preferences">
      <h1>{t("rankAnswers")}</h1>
      <p class="note">{t("rankAnswersText")}</p>
      {problem.value && (
        <div class="problem" role="alert">
          {problem.value}
        </div>
      )}
      <PromptForm />
      {round.value && <Answers />}
      <div role="status" class="note round-status">
        {status.value}
      </div>
      <SavedRankings />
    </div>
  );
}

function onKey(event: KeyboardEvent): void {
  const target = event.target as HTMLElement;
  if (!round.value?.sampled || isComposing(event) || event.ctrlKey || event.metaKey || event.altKey) return;
  if (target.matches("input, textarea, select") || target.closest("dialog")) return;
  if (/^[1-9]$/.test(event.key)) rankNext(Number(event.key) - 1);
  else if (event.key === "=") markTie();
  else if (event.key === "Backspace") undo();
  else if (event.key === "s" || event.key === "S") skip();
  else if (event.key === "Enter" && !target.matches("button:not(.chip), a, summary")) void save();
  else return;
  event.preventDefault();
}

/** Tie the next answer with the last one; if all are ranked, toggle the tie of the last two. */
function markTie(): void {
  const count = rankedAnswers(ranking.value).length;
  if (count === round.value!.answers.length) ranking.value = toggleTie(ranking.value, count - 2);
  else if (count) tied.value = !tied.value;
}

function undo(): void {
  const last = rankedAnswers(ranking.value).at(-1);
  if (last !== undefined) ranking.value = without(ranking.value, last);
  tied.value = false;
}

function PromptForm() {
  const fileProblem = useSignal("");
  const chats = models.value.filter((each) => each.kind === "chat");
  const settings = sampling.value;
  const isSampling = round.value !== null && !round.value.sampled;
  const submit = (event: Event) => {
    event.preventDefault();
    void sample();
  };
  const load = async (event: Event) => {
    const input = event.currentTarget as HTMLInputElement;
    const selected = input.files?.[0];
    input.value = "";
    if (!selected) return;
    const prompts = promptsOf(await selected.text());
    fileProblem.value = prompts.length ? "" : t("noPrompts");
    if (!prompts.length) return;
    await startPrompts(prompts);
  };
  const numeric = (name: keyof typeof settings, label: string, min: number, max: number, step: number) => (
    <label>
      <span>{label}</span>
      <input
        type="number"
        min={min}
        max={max}
        step={step}
        required
        value={settings[name]}
        onChange={(event) => {
          const { valueAsNumber, validity } = event.currentTarget;
          if (validity.valid) sampling.value = { ...sampling.value, [name]: valueAsNumber };
        }}
      />
    </label>
  );
  return (
    <form class="form prompt-form" onSubmit={submit}>
      <label>
        <span>{t("prompt")}</span>
        <textarea
          rows={3}
          required
          placeholder={t("promptHint")}
          value={prompt.value}
          onInput={(event) => (prompt.value = event.currentTarget.value)}
          onKeyDown={(event) => {
            if (event.key === "Enter" && !event.shiftKey && !isComposing(event)) submit(event);
          }}
        />
      </label>
      {!prompt.value && !promptQueue.value.length && (
        <div class="row">
          {list("examples").map((each) => (
            <button key={each} type="button" class="example" onClick={() => (prompt.value = each)}>
              {each}
            </button>
          ))}
        </div>
      )}
      <label>
        <span>{t("annotator")}</span>
        <input
          type="text"
          maxLength={64}
          autocomplete="off"
          placeholder={t("annotatorHint")}
          value={annotator.value}
          onInput={(event) => setAnnotator(event.currentTarget.value)}
          onChange={() => void changeAnnotator()}
        />
      </label>
      <details>
        <summary>{t("systemPrompt")}</summary>
        <textarea
          rows={2}
          aria-label={t("systemPrompt")}
          value={system.value}
          onInput={(event) => (system.value = event.currentTarget.value)}
        />
      </details>
      <div class="grid">
        <label>
          <span>{t("model")}</span>
          <select value={model.value?.id ?? ""} onChange={(event) => selectModel(event.currentTarget.value)}>
            {!chats.length && <option value="">{t("noModel")}</option>}
            {chats.map((each) => (
              <option key={each.id} value={each.id}>
                {each.id}
              </option>
            ))}
          </select>
        </label>
        {comparable.value.length > 1 && (
          <details class="compared">
            <summary>{t("compareModels", { n: number(compared.value.length) })}</summary>
            {comparable.value.map((id) => (
              <label key={id} class="check">
                <input
                  type="checkbox"
                  checked={compared.value.includes(id)}
                  onChange={(event) => {
                    const others = compared.value.filter((each) => each !== id);
                    compared.value = event.currentTarget.checked ? [...others, id] : others;
                    const n = compared.value.length > 1 ? 1 : 4;
                    sampling.value = { ...sampling.value, n };
                  }}
                />
                {id}
              </label>
            ))}
          </details>
        )}
        {numeric("n", t("answerCount"), compared.value.length > 1 ? 1 : 2, 4, 1)}
        {numeric("temperature", t("temperature"), 0.05, 2, 0.05)}
        {numeric("max_tokens", t("maxTokens"), 1, 8192, 1)}
      </div>
      <div class="row">
        {isSampling ? (
          // Keyed: if this button became the submit button during a click, it would submit the form.
          <button key="stop" type="button" onClick={cancelRound}>
            <Icon name="stop" /> {t("stop")}
          </button>
        ) : (
          <button
            key="sample"
            type="submit"
            class={round.value ? "" : "primary"}
            disabled={!prompt.value.trim() || (model.value === null && !compared.value.length)}
          >
            {t("generateAnswers")}
          </button>
        )}
        <label class="button">
          {t("loadPrompts")}
          <input
            class="sr-only"
            type="file"
            accept=".jsonl,.json,.txt,application/json,text/plain"
            onChange={load}
          />
        </label>
        {promptQueue.value.length > 0 && (
          <span class="note">{t("promptsLeft", { n: number(promptQueue.value.length) })}</span>
        )}
        {progress.value.total > 0 && <span class="note">{progressText()}</span>}
        {count.value !== null && count.value > 0 && (
          <button type="button" class="quiet" onClick={() => void takeBack()}>
            {t("takeBack")}
          </button>
        )}
        {promptQueue.value.length > 0 && round.value === null && (
          // Without answers, the skip button is not available.
          <button type="button" onClick={takeNext}>
            {t("nextPrompt")}
          </button>
        )}
        <span role="status">{fileProblem.value}</span>
      </div>
    </form>
  );
}

function Answers() {
  const { answers, sampled } = round.value!;
  const section = useRef<HTMLElement>(null);
  useEffect(() => {
    // Move the focus out of the form, where Enter would sample again.
    if (sampled) section.current?.focus({ preventScroll: true });
    section.current?.scrollIntoView({ block: "start" });
  }, [sampled]);
  return (
    <section class="ranking" ref={section} tabindex={-1} aria-label={t("rankAnswers")}>
      <div class="cards">
        {answers.map((answer, i) => {
          const rank = rankOf(ranking.value, i);
          return (
            <article
              key={i}
              class={rank === null ? "card" : "card ranked"}
              aria-label={t("answerAt", { n: i + 1 })}
            >
              <header
                draggable={sampled}
                onDragStart={(event) => event.dataTransfer!.setData("text/plain", String(i))}
              >
                <kbd>{i + 1}</kbd>
                <span class="note grow">
                  {sampled && (rank === null ? t("notRanked") : t("rankOf", { n: rank }))}
                  {answer.finish === "length" && ` · ${t("lengthLimit")}`}
                </span>
                {sampled && (
                  <button
                    type="button"
                    class="quiet"
                    disabled={rank !== null}
                    aria-label={t("rankNext", { n: i + 1 })}
                    title={t("rankNext", { n: i + 1 })}
                    onClick={() => rankNext(i)}
                  >
                    <Icon name="check" />
                  </button>
                )}
              </header>
              <Markdown text={answer.text} finished={sampled} />
            </article>
          );
        })}
      </div>
      {sampled && <Order count={answers.length} />}
    </section>
  );
}

/** The ranked answers: drag them, move them with the arrow keys, and mark ties. */
function Order(props: { count: number }) {
  const order = rankedAnswers(ranking.value);
  const drop = (event: DragEvent, before: number | null) => {
    event.preventDefault();
    event.stopPropagation();
    const answer = Number(event.dataTransfer!.getData("text/plain"));
    if (Number.isInteger(answer) && answer < props.count) ranking.value = put(ranking.value, answer, before);
  };
  const onDragOver = (event: DragEvent) => event.preventDefault();
  const onKeyDown = (event: KeyboardEvent, answer: number) => {
    const by = { ArrowLeft: -1, ArrowUp: -1, ArrowRight: 1, ArrowDown: 1 }[event.key];
    if (by === undefined) return;
    event.preventDefault();
    ranking.value = move(ranking.value, answer, by as 1 | -1);
  };
  return (
    <div class="strip">
      <ol aria-label={t("ranking")} onDragOver={onDragOver} onDrop={(event) => drop(event, null)}>
        {!order.length && <li class="note">{t("ranking")}</li>}
        {order.map((answer, i) => {
          const isTied = i < order.length - 1 && rankOf(ranking.value, answer) === rankOf(ranking.value, order[i + 1]!);
          return (
            <li key={answer} onDragOver={onDragOver} onDrop={(event) => drop(event, answer)}>
              <button
                type="button"
                class="chip"
                draggable
                aria-label={`${t("answerAt", { n: answer + 1 })}, ${t("rankOf", { n: rankOf(ranking.value, answer)! })}`}
                onDragStart={(event) => event.dataTransfer!.setData("text/plain", String(answer))}
                onKeyDown={(event) => onKeyDown(event, answer)}
              >
                {answer + 1}
              </button>
              {i < order.length - 1 && (
                <button
                  type="button"
                  class="quiet relation"
                  aria-label={t(isTied ? "tiedWith" : "betterThan")}
                  title={t(isTied ? "tiedWith" : "betterThan")}
                  onClick={() => (ranking.value = toggleTie(ranking.value, i))}
                >
                  {isTied ? "=" : ">"}
                </button>
              )}
            </li>
          );
        })}
        {tied.value && <li class="note">=</li>}
      </ol>
      <div class="row">
        <button type="button" disabled={!order.length} onClick={undo}>
          {t("undo")}
        </button>
        <button type="button" onClick={skip}>
          {t("skip")}
        </button>
        <button
          type="button"
          class="primary"
          disabled={!isComplete(ranking.value, props.count)}
          onClick={() => void save()}
        >
          {t("saveRanking")}
        </button>
      </div>
      <p class="note">
        {order.length === props.count && ranking.value.length === 1 ? t("allTied") : t("rankHelp")}
      </p>
    </div>
  );
}

/** Names models, so it is closed until someone opens it. */
function AgreementView() {
  const report = agreement.value;
  const interval = report?.alpha_interval?.map((each) => number(each, 2)).join(" – ");
  return (
    <details
      class="agreement"
      onToggle={(event) => {
        if (event.currentTarget.open) void loadAgreement();
      }}
    >
      <summary>{t("agreement")}</summary>
      {report && (
        <>
          <p>
            {t("alpha")}: {report.alpha === null ? "–" : number(report.alpha, 3)}
            {interval && ` [${interval}]`} · {t("sharedItems", { n: number(report.shared_items) })}
          </p>
          <p class="note">
            {Object.entries(report.annotators)
              .map(([name, items]) => `${name}: ${number(items)}`)
              .join(" · ")}
          </p>
          {report.models.length > 0 && (
            <table>
              <thead>
                <tr>
                  <th>{t("model")}</th>
                  <th>{t("winRate")}</th>
                  <th>{t("comparisons")}</th>
                </tr>
              </thead>
              <tbody>
                {report.models.map((row) => (
                  <tr key={row.model}>
                    <td>{row.model}</td>
                    <td>{number(100 * row.rate)} %</td>
                    <td>{number(row.comparisons)}</td>
                  </tr>
                ))}
              </tbody>
            </table>
          )}
          <p>{t("disputedItems", { n: number(report.disputed) })}</p>
          <ul>
            {report.disputes.map((item) => (
              <li key={item.id}>
                {item.prompt.at(-1)?.content} ({number(100 * item.discordance)} %)
              </li>
            ))}
          </ul>
        </>
      )}
    </details>
  );
}

function SavedRankings() {
  const copied = useSignal(false);
  const command = `khaosz train recipes/dpo.toml init_from=MODEL data=khaosz-data/${file.value}`;
  const copy = async () => {
    await copyText(command);
    copied.value = true;
    setTimeout(() => (copied.value = false), 1500);
  };
  if (count.value === null) return null;
  return (
    <section>
      <div class="row spread">
        <h2>{t("trainOnRankings")}</h2>
        <span class="row">
          <span class="note">{t("rankingCount", { n: number(count.value) })}</span>
          <button type="button" disabled={!count.value} onClick={() => void download()}>
            {t("exportRankings")}
          </button>
        </span>
      </div>
      <AgreementView />
      <p class="note">{t("trainText")}</p>
      <div class="command">
        <code>{command}</code>
        <button type="button" class="quiet" aria-label={t("copy")} title={t("copy")} onClick={() => void copy()}>
          <Icon name={copied.value ? "check" : "copy"} />
        </button>
      </div>
    </section>
  );
}
