// What a page that the user has open elsewhere can try on the API of `make ui`; returns each attempt and what it got.
async ({api, id}) => {
  const told = [];
  const attempt = async (name, act) => {
    try { told.push([name, await act()]); } catch { told.push([name, null]); }
  };
  const steps = [{"prefect.deployments.steps.run_shell_script": {script: "touch marker"}}];
  const wish = JSON.stringify({state: {type: "SCHEDULED"}});
  const requests = [
    ["POST", "/deployments/filter", "{}"],
    ["GET", "/csrf-token?client=x"],
    ["GET", `/deployments/${id}`],
    ["PATCH", `/deployments/${id}`, JSON.stringify({pull_steps: steps})],
    ["POST", `/deployments/${id}/create_flow_run`, wish],
  ];
  for (const mode of ["cors", "no-cors", "same-origin"])
    for (const credentials of ["include", "omit"])
      for (const [method, path, body] of requests)
        await attempt(`${mode} ${credentials} ${method} ${path}`, async () => {
          const headers = {"content-type": mode == "no-cors" ? "text/plain" : "application/json"};
          const answer = await fetch(api + path, {method, body, mode, credentials, headers});
          return answer.type == "opaque" ? null : answer.ok;
        });
  for (const path of ["/events/in", "/events/out", "/logs/out"])
    for (const words of [[], ["prefect"]])
      await attempt(`socket ${path} ${words}`, () => new Promise((done, failed) => {
        const socket = new WebSocket(api.replace("http", "ws") + path, words);
        socket.onopen = () => done(true);
        socket.onerror = failed;
      }));
  await attempt("storage", async () => localStorage.getItem("prefect-password"));
  await attempt("frame", () => new Promise((done, failed) => {
    const frame = document.createElement("iframe");
    frame.onload = () => {
      try { done(frame.contentWindow.localStorage.getItem("prefect-password")); } catch (error) { failed(error); }
    };
    frame.src = api.replace("/api", "/v2/dashboard");
    document.body.append(frame);
  }));
  const form = document.createElement("form");
  Object.assign(form, {method: "POST", action: `${api}/deployments/${id}/create_flow_run`});
  Object.assign(form, {enctype: "text/plain", target: "_blank"});
  form.append(Object.assign(document.createElement("input"), {name: wish.slice(0, -1) + ',"x":"', value: '"}'}));
  document.body.append(form);
  form.submit();
  return told;
}
